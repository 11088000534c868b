"""Builds the emulated kernels and runs them on cases, in a process of their own: a planted bug may crash or hang it."""

import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from cuda_cases import Inputs
from torch import Tensor

from megatron_fipo.ops.fused_loss import NUM_STATISTICS

_HERE = Path(__file__).parent
CSRC = _HERE.parents[1] / "csrc"
KINDS = ("fipo_loss", "future_kl_aggregate", "scan_reverse", "scan_forward", "scale_per_sequence")


def build(program: Path, csrc: Path = CSRC, flags: Sequence[str] = ()) -> Path:
    command = ["g++", "-std=c++17", "-pthread", *flags, f"-I{csrc}", f"-I{_HERE}", str(_HERE / "run_cases.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=200)
    return program


def mutated_sources(folder: Path, file: str, mutations: Mapping[str, str]) -> Path:
    """A copy of csrc in which each text of csrc/cuda/FILE, found exactly once, is replaced."""
    csrc = folder / "csrc"
    for part in ("core", "cuda"):
        shutil.copytree(CSRC / part, csrc / part)
    path = csrc / "cuda" / file
    source = path.read_text()
    for old, new in mutations.items():
        assert source.count(old) == 1, f"{file} holds {old!r} {source.count(old)} times"
        source = source.replace(old, new)
    path.write_text(source)
    return csrc


def _vector(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return struct.pack("<q", -1)
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return struct.pack("<q", tensor.numel()) + bits.contiguous().numpy().tobytes()


def _case(kind: str, inputs: Inputs) -> bytes:
    case, (clip_low, clip_high) = inputs.case, inputs.clip_range
    header = struct.pack(
        "<8q7d",
        KINDS.index(kind), inputs.mask_T.shape[0], inputs.cu_seqlens_S1.shape[0] - 1, case.wide, case.bf16,
        case.advantage_is_per_token, case.paper, case.misaligned, inputs.gamma, *case.weight_range,
        inputs.safety_threshold, case.dual_clip, clip_low, clip_high,
    )  # fmt: skip
    carry = {"future_kl_aggregate": None, "scale_per_sequence": inputs.scale_S}.get(kind, inputs.carry_S)
    streams = (
        [inputs.x_T]
        if kind.startswith("sca")
        else [inputs.logp_T, inputs.old_logp_T, inputs.mask_T, inputs.advantage]
        + [inputs.token_weight_T if kind == "fipo_loss" else None]
    )
    return header + b"".join(map(_vector, [inputs.cu_seqlens_S1, carry, *streams]))


def run(
    program: Path, folder: Path, batches: Sequence[Inputs], seed: int, timeout: float = 120
) -> list[dict[str, Tensor]]:
    """The results of every batch (cuda_cases.results), from one process with one workspace.

    seed: of the order in which fibers and blocks run. Raises subprocess errors when the process fails or hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    capacity = max(batch.mask_T.shape[0] for batch in batches)
    cases = [_case(kind, batch) for batch in batches for kind in KINDS]
    (folder / "cases").write_bytes(struct.pack("<q", capacity) + b"".join(cases))
    command = [str(program), str(seed), str(folder / "cases"), str(folder / "results")]
    subprocess.run(command, check=True, timeout=timeout, capture_output=True)
    data = memoryview(bytearray((folder / "results").read_bytes()))
    taken = 0

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal taken
        count = int(torch.Size(shape).numel())
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=taken).view(shape)
        taken += count * dtype.itemsize
        return tensor

    results = []
    for batch in batches:
        T, S = batch.mask_T.shape[0], batch.cu_seqlens_S1.shape[0] - 1
        results.append(
            {
                "loss": take(torch.float64, S),
                "counts": take(torch.int64, S, 2),
                "grad": take(torch.float32, T),
                "weight": take(torch.float32, T),
                "statistics": take(torch.float64, NUM_STATISTICS),
                "aggregate": take(torch.float32, S),
                "beyond_c": take(torch.int32, S),
                "reverse": take(torch.float32, T),
                "forward": take(torch.float32, T),
                "scaled": take(torch.float32, T),
            }
        )
    assert taken == len(data)
    return results
