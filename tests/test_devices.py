"""What is known of devices, found by any name that people or JAX have for them."""

import jax
import pytest

from sparse_flax.devices import (
    DEVICES,
    GIB,
    Budget,
    dtype_notice,
    here,
    named,
    peak,
)
from sparse_flax.errors import UserError


@pytest.mark.parametrize(
    ("device_kind", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("TPU v60", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_knows_the_peak_of_a_device_by_its_whole_name(device_kind, expected):
    assert peak(device_kind) == expected


@pytest.mark.parametrize(
    ("name", "device", "gib"),
    [
        ("H200", "H200", 140.4),
        ("h200", "H200", 140.4),
        ("NVIDIA H200", "H200", 140.4),
        ("Tesla T4", "T4", 15),
        ("A100-40GB", "A100 40GB", 40),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 80),
        ("Tesla V100-SXM2-16GB", "V100 16GB", 16),
        ("v5e", "TPU v5e", 16),
        ("TPU v5 lite", "TPU v5e", 16),
        ("TPU v5", "TPU v5p", 95),
    ],
)
def test_finds_the_memory_of_a_device(name, device, gib):
    budget = named(name)
    assert (budget.device, budget.total) == (device, int(gib * GIB))
    assert budget.usable <= budget.highest < budget.total


def test_every_row_is_found_by_its_own_name():
    assert [named(name).device for name in DEVICES] == list(DEVICES)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("H20", "'H200'"),
        ("A100", "'A100 80GB'"),  # of which there are two
        ("RTX 4900", "'RTX 4090'"),
        ("v5f", "'TPU v5p'"),
        ("", "--device"),
    ],
)
def test_an_unknown_device_is_a_sentence_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"--device={name} is none of B200, ") as e:
        named(name)
    assert nearest in str(e.value).rpartition("try ")[2]


def test_jax_takes_the_share_of_a_gpu_that_the_environment_says(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert named("T4") == Budget(
        "T4", 15 * GIB, int(0.75 * 15 * GIB), int(0.92 * 15 * GIB)
    )
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert named("T4").usable == 7.5 * GIB
    tpu = named("v5e")
    assert tpu.usable == tpu.highest > 15.5 * GIB
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".96")
    assert named("T4").usable == named("T4").highest == int(0.96 * 15 * GIB)
    for wrong in ("most", "0", "75"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"FRACTION={wrong} is not from 0 to 1"):
            named("T4")


def test_a_cpu_is_no_accelerator():
    assert jax.devices()[0].platform == "cpu" and here() is None


def test_says_where_a_gpu_has_no_bfloat16():
    assert "float16" in dtype_notice("Tesla T4", "bfloat16")
    assert dtype_notice("Tesla T4", "float16") is None
    assert dtype_notice("NVIDIA H100 80GB HBM3", "bfloat16") is None
    assert dtype_notice("cpu", "bfloat16") is None
