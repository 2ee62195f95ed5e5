"""The Sparse Transformer (Child, Gray, Radford, Sutskever 2019) in JAX and Flax."""

__version__ = "0.1.0"
