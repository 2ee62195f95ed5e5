"""NVIDIA Hopper: Pallas Mosaic GPU kernels."""
