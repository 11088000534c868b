"""Published peaks by device name; the rates themselves are tested in tests/parallel/test_metrics.py."""

import pytest

from megatron_fipo.observe.peaks import peak_flops


@pytest.mark.parametrize(
    ("device", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", 756.5, 1513.0),
        ("NVIDIA H100 NVL", 835.5, 1670.9),
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA H20", 148.0, 296.0),
        ("NVIDIA GH200 480GB", 989.4, 1978.9),
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA GB200", 2500.0, 5000.0),
        ("NVIDIA L40S", 362.1, 733.0),
        ("NVIDIA L4", 121.0, 242.5),
        ("NVIDIA GeForce RTX 3090", None, None),
        ("Tesla V100-SXM2-32GB", None, None),
    ],
)
def test_peaks(device, bf16, fp8):
    assert peak_flops(device, "bf16") == (None if bf16 is None else pytest.approx(bf16 * 1e12))
    assert peak_flops(device, "fp8") == (None if fp8 is None else pytest.approx(fp8 * 1e12))
    assert peak_flops(device, "fp32") is None
