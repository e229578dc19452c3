"""The table of chips, and which devices share a fast network."""

from types import SimpleNamespace

import jax
import pytest

from gpt2_jax.hardware import CHIPS, GIB, GPU_MEMORY_SHARE, chip_of, host_of, peak_memory, slice_of
from gpt2_jax.metrics import ThroughputMeter


def device(kind="", platform="gpu", runtime="pjrt_ifrt", **attributes):
    client = SimpleNamespace(runtime_type=runtime)
    return SimpleNamespace(device_kind=kind, platform=platform, client=client, **attributes)


def test_the_figures_are_possible():
    """Outside of these ranges are slips: a factor of 1,000, a figure with sparsity, both directions of a link."""
    for kind, chip in CHIPS.items():
        assert 2e13 < chip.flops <= 2.5e15, kind
        assert 7 * GIB < chip.memory < 260 * GIB, kind
        assert 3e11 <= chip.bandwidth <= 8e12, kind
        assert 50 <= chip.flops / chip.bandwidth <= 600, kind  # FLOPs per byte
        assert 1.6e10 <= chip.link <= 9e11, kind
        assert chip.network <= chip.link, kind


@pytest.mark.parametrize(
    ("kind", "tflops", "gib"),
    [
        ("Tesla T4", 65, 14.6),
        ("Tesla V100-SXM2-16GB", 125, 15.8),
        ("NVIDIA GeForce RTX 3090", 71, 23.7),  # float32 accumulation at half of GA102's 142
        ("NVIDIA GeForce RTX 4090", 165.2, 23.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 31.4),
        ("NVIDIA L4", 121, 22.0),  # the data sheet's 242 is with sparsity
        ("NVIDIA L40S", 362, 44.4),
        ("NVIDIA A100-SXM4-80GB", 312, 79.1),
        ("NVIDIA H100 80GB HBM3", 989, 79.1),
        ("NVIDIA B200", 2250, 178.3),
    ],
)
def test_gpus_that_people_have(kind, tflops, gib):
    chip = chip_of(device(kind))
    assert (chip.flops, chip.memory) == pytest.approx((tflops * 1e12, GPU_MEMORY_SHARE * gib * GIB))


def test_a_tpu_device_is_a_core_or_a_chip():
    """Google's figures of a chip, by JAX's devices per chip."""
    chips = {"TPU v2": (46, 16, 2), "TPU v3": (123, 32, 2), "TPU v4": (275, 32, 1), "TPU7x": (2307, 192, 2)}
    for kind, (tflops, gib, devices) in chips.items():
        chip = CHIPS[kind]
        assert (devices * chip.flops, devices * chip.memory) == (tflops * 1e12, gib * GIB)
    assert CHIPS["TPU v5 lite"] is CHIPS["TPU v5e"]


@pytest.mark.parametrize("kind", CHIPS)
def test_utilization_is_known_on_every_chip(kind):
    meter = ThroughputMeter(int(CHIPS[kind].flops), [device(kind)], "bfloat16")
    meter.start(0)
    speed = meter.read(1)
    assert speed.mfu == pytest.approx(speed.tokens_per_second, rel=1e-6)  # a token that takes a second at the peak
    assert chip_of(jax.devices()[0]) is None


def test_the_slice_of_a_device():
    tpu = device("TPU v5 lite", "tpu", slice_index=1, process_index=3, id=300)
    assert (slice_of(tpu), host_of(tpu)) == (1, 3)
    assert slice_of(device("TPU v5 lite", "tpu", process_index=3, id=3)) == 0
    # XLA knows which GPUs a switch or a host connects, by either of two names.
    assert slice_of(device("NVIDIA L4", id=5, slice_index=2, partition_index=0)) == 2
    assert slice_of(device("NVIDIA L4", id=5, slice_index=0, partition_index=1)) == 1
    assert slice_of(device("cpu", "cpu", process_index=4)) == 0


def test_the_slice_of_a_gpu_that_is_not_attached():
    def absent(kind, id):
        return device(kind, runtime="compile_only_runtime", id=id, slice_index=0)

    rack = absent("NVIDIA GB200", 71)
    assert (slice_of(rack), host_of(rack)) == (0, 17)
    assert [slice_of(absent("NVIDIA A40", id)) for id in (7, 8)] == [0, 1]
    assert slice_of(absent("unheard-of", 16)) == 2


def test_the_peak_of_a_device_that_counts_its_memory():
    stats = {"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 15}
    assert peak_memory(device(memory_stats=lambda: stats)) == (7, 15)
    assert peak_memory(device(memory_stats=lambda: {"bytes_in_use": 5})) is None
    assert peak_memory(jax.devices("cpu")[0]) is None
