"""What the devices could do at best."""

# Dense peaks of NVIDIA's data sheets in TFLOP/s, (bf16, fp8), by a part of torch's device name; the first match counts.
# None: the device has no fp8.
PEAK_TFLOPS: dict[str, tuple[float, float | None]] = {
    "GB300": (2500.0, 5000.0),
    "GB200": (2500.0, 5000.0),
    "B300": (2250.0, 4500.0),
    "B200": (2250.0, 4500.0),
    "B100": (1750.0, 3500.0),
    "GH200": (989.4, 1978.9),
    "H200 NVL": (835.5, 1670.9),
    "H200": (989.4, 1978.9),
    "H800 PCIe": (756.5, 1513.0),
    "H800": (989.4, 1978.9),
    "H100 NVL": (835.5, 1670.9),
    "H100 PCIe": (756.5, 1513.0),
    "H100": (989.4, 1978.9),
    "H20": (148.0, 296.0),
    "A100": (312.0, None),
    "A800": (312.0, None),
    "L40S": (362.1, 733.0),
    "L4": (121.0, 242.5),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations per second of one device, ``precision`` "bf16" or "fp8"; None if no peak is known, as for fp32."""
    words = device_name.replace("-", " ")
    for name, (bf16, fp8) in PEAK_TFLOPS.items():
        if f" {name} " in f" {words} ":
            peak = {"bf16": bf16, "fp8": fp8}.get(precision)
            return None if peak is None else peak * 1e12
    return None
