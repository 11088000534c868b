"""Inputs on which the CUDA kernels are compared with the CPU's: for the emulator and for a GPU alike."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.ops.fused_loss import EXTREMA, SUMS
from megatron_fipo.ops.library import operators


@dataclass(frozen=True)
class Case:
    """lengths: tokens per sequence, or how many sequences of random lengths. misaligned: tokens that every stream
    starts behind a vector boundary. drift: standard deviation of logp - old_logp."""

    name: str
    lengths: tuple[int, ...] | int
    padding: int = 0
    half_life: float = 32.0
    carry: bool = False
    misaligned: int = 0
    bf16: bool = False
    advantage_is_per_token: bool = False
    token_weight: bool = False
    paper: bool = False
    wide: bool = False
    weight_range: tuple[float, float] = (0.8, 1.2)
    dual_clip: float = 10.0
    drift: float = 0.3


# A tile is 2048 tokens, a warp's share 512, a row 128, a vector 4.
CASES = (
    Case("one token", (1,)),
    Case("one vector", (4,), carry=True),
    Case("exactly one tile", (2048,)),
    Case("one token more than a tile", (2049,), carry=True),
    Case("ends on every tile boundary", (2048, 4096, 2048), half_life=512, carry=True, wide=True),
    Case("starts at a boundary, goes on", (2048, 5000), token_weight=True),
    Case("long, half-life over several tiles", (9000,), half_life=2048, padding=3),
    Case("single tokens between long ones", (5000, 1, 1, 1, 3000), half_life=2048, carry=True),
    Case("almost no discount", (7000, 5000), half_life=1e5, drift=0.01),
    Case("no discount at all", (5000, 4000), half_life=math.inf, carry=True, drift=0.01),
    Case("more than 32 tiles ahead", (34 * 2048 + 77, 1000), half_life=20000, drift=0.01),
    Case("only single tokens", (1,) * 2500, carry=True),
    Case("hundreds of short ones", 150, half_life=8, carry=True, wide=True, advantage_is_per_token=True),
    Case("empty sequences", (0, 100, 0, 0, 1948, 0, 17, 0, 3000, 0, 0), half_life=128, carry=True),
    Case("empty at tile boundaries", (2048, 0, 0, 2048, 0), padding=2048),
    Case("nothing but empty ones", (0, 0, 0), padding=2100),
    Case("no sequences", (), padding=50),
    Case("no tokens", (0, 0)),
    Case("much padding", (700, 1500), padding=5000, wide=True, token_weight=True),
    Case("misaligned by 1", (5000, 3, 1001), misaligned=1, carry=True),
    Case("misaligned by 2, per token", (3000, 600), misaligned=2, advantage_is_per_token=True, token_weight=True),
    Case("per token", (2500, 1600, 37), advantage_is_per_token=True, carry=True),
    Case("per token and weights, odd length", (4001,), advantage_is_per_token=True, token_weight=True, padding=2),
    Case("bf16", (2500, 1000, 3), bf16=True, carry=True),
    Case("bf16 misaligned, weights", (2100, 900), bf16=True, misaligned=3, token_weight=True),
    Case("paper", (3000, 900), paper=True, dual_clip=3.0, drift=0.8),
    Case("paper, any weight", (3000, 900), paper=True, weight_range=(0.0, math.inf), half_life=8, drift=0.2),
    Case("weights from 0 to 10", (2600, 500), weight_range=(0.0, 10.0), dual_clip=3.0, drift=0.8),
    Case("high only", (2600, 500), weight_range=(1.0, 1.2), dual_clip=1.5, drift=0.8),
    Case("unmoved policy", (3000, 2000), drift=0.0),
    Case("random lengths", 7, half_life=128, padding=9, carry=True, drift=0.5),
    Case("random lengths, per token", 6, half_life=512, advantage_is_per_token=True, token_weight=True, drift=0.5),
)


@dataclass(frozen=True)
class Inputs:
    """Streams [T], per sequence [S]; whatever belongs to no response token is NaN."""

    case: Case
    logp_T: Tensor
    old_logp_T: Tensor
    advantage: Tensor
    mask_T: Tensor
    cu_seqlens_S1: Tensor
    token_weight_T: Tensor | None
    carry_S: Tensor | None
    x_T: Tensor

    @property
    def gamma(self) -> float:
        return 2.0 ** (-1.0 / self.case.half_life)

    @property
    def scale_S(self) -> Tensor:
        """fp64, for scale_per_sequence."""
        return torch.arange(self.cu_seqlens_S1.shape[0] - 1, device=self.x_T.device).double().cos()

    @property
    def safety_threshold(self) -> float:
        return 3.0

    @property
    def clip_range(self) -> tuple[float, float]:
        return 0.2, 0.28


def make_inputs(case: Case, seed: int) -> Inputs:
    rng, g = random.Random(f"{case.name} {seed}"), torch.Generator().manual_seed(seed)
    lengths = case.lengths
    if isinstance(lengths, int):
        longest = 60 if lengths > 100 else 5000
        lengths = tuple(rng.choice((1, 2, 3, 4, 5, 31, 32, 33, rng.randint(1, longest))) for _ in range(lengths))
    used = sum(lengths)
    tokens = used + case.padding
    dtype = torch.bfloat16 if case.bf16 else torch.float32

    d_T = case.drift * torch.randn(tokens, generator=g)
    if case.drift:
        lucky_T = torch.rand(tokens, generator=g)
        d_T = torch.where(lucky_T < 0.01, d_T + 2.5, d_T)
        d_T = torch.where(lucky_T > 0.998, d_T - 8.0, d_T)
        d_T = torch.where((lucky_T > 0.5) & (lucky_T < 0.5005), 40.0 * d_T.sign(), d_T)
    logp_T = -3.0 * torch.rand(tokens, generator=g)
    old_logp_T = logp_T - d_T
    mask_T = torch.rand(tokens, generator=g) < 0.85
    advantage = torch.randn(tokens if case.advantage_is_per_token else len(lengths), generator=g)
    token_weight_T = 2.0 * torch.rand(tokens, generator=g) if case.token_weight else None
    outside_T = ~mask_T | (torch.arange(tokens) >= used)
    logp_T = torch.where(outside_T & (torch.rand(tokens, generator=g) < 0.5), torch.nan, logp_T)
    if token_weight_T is not None:
        token_weight_T = torch.where(outside_T, torch.nan, token_weight_T)
    x_T = torch.randn(tokens, generator=g)
    x_T[used:] = torch.nan
    return Inputs(
        case,
        logp_T.to(dtype),
        old_logp_T.to(dtype),
        advantage,
        mask_T,
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int64 if case.wide else torch.int32),
        token_weight_T,
        torch.randn(len(lengths), generator=g, dtype=torch.float64) if case.carry else None,
        x_T,
    )


def loss_arguments(inputs: Inputs) -> tuple:
    """What `operators.fipo_loss` takes."""
    case, (clip_low, clip_high) = inputs.case, inputs.clip_range
    return (
        inputs.logp_T, inputs.old_logp_T, inputs.advantage, inputs.mask_T, inputs.cu_seqlens_S1, inputs.token_weight_T,
        inputs.carry_S, case.advantage_is_per_token, inputs.gamma, *case.weight_range, inputs.safety_threshold,
        case.dual_clip, clip_low, clip_high, case.paper,
    )  # fmt: skip


def aggregate_arguments(inputs: Inputs) -> tuple:
    """What `operators.future_kl_aggregate` takes."""
    return (
        inputs.logp_T, inputs.old_logp_T, inputs.advantage, inputs.mask_T, inputs.cu_seqlens_S1,
        inputs.case.advantage_is_per_token, inputs.gamma, inputs.case.dual_clip, *inputs.clip_range,
    )  # fmt: skip


def results(run, inputs: Inputs) -> dict[str, Tensor]:
    """Everything the kernels of `run` (a namespace of operators) make of the inputs, on the CPU."""
    scan = (inputs.x_T, inputs.cu_seqlens_S1, inputs.gamma)
    loss_S, counts_S2, grad_T, weight_T, statistics_K = run.fipo_loss(*loss_arguments(inputs))
    aggregate_S, beyond_c_S = run.future_kl_aggregate(*aggregate_arguments(inputs))
    return {
        "loss": loss_S,
        "counts": counts_S2,
        "grad": grad_T,
        "weight": weight_T,
        "statistics": statistics_K,
        "aggregate": aggregate_S,
        "beyond_c": beyond_c_S,
        "reverse": run.discounted_scan(*scan, True, inputs.carry_S),
        "forward": run.discounted_scan(*scan, False, inputs.carry_S),
        "scaled": run.scale_per_sequence(inputs.x_T, inputs.scale_S, inputs.cu_seqlens_S1),
    }


def expected_results(inputs: Inputs) -> dict[str, Tensor]:
    """By the CPU's kernels, which take fp32 only."""
    wide = Inputs(**{**vars(inputs), "logp_T": inputs.logp_T.float(), "old_logp_T": inputs.old_logp_T.float()})
    return results(operators, wide)


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> list[str]:
    """One line for each result that is further off than rounding explains."""
    # the error of F, relative to its own size, is that of exp(F) once it is multiplied by F
    slow = case.half_life > 100
    tolerance = {name: (2e-5, 2e-5) for name in actual} | {
        "counts": (0.0, 0.0),
        "beyond_c": (0.0, 0.0),
        "grad": (1e-4, 1e-4) if slow else (2e-5, 1e-5),
        "weight": (1e-4, 1e-4) if slow else (2e-5, 2e-5),
        "loss": (1e-4, 2e-4) if slow else (2e-5, 5e-5),
    }
    lines = []
    for name, (relative, absolute) in tolerance.items():
        if name == "statistics":
            continue
        a, e = actual[name].double(), expected[name].double()
        scale = float(e.abs().max()) if name in ("reverse", "forward", "aggregate") and e.numel() else 1.0
        wrong = ~torch.isclose(a, e, rtol=relative, atol=absolute * max(scale, 1.0))
        if a.shape != e.shape or wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            lines.append(f"{name}: {int(wrong.sum())} of {wrong.numel()}, first at {at}: {a[at]} not {e[at]}")
    names = [*SUMS, *(f"min {name}" for name in EXTREMA), *(f"max {name}" for name in EXTREMA)]
    for name, a, e in zip(names, actual["statistics"].tolist(), expected["statistics"].tolist(), strict=True):
        rounded = any(word in name for word in ("weight", "ratio")) and "_at_" not in name
        close = math.isclose(a, e, rel_tol=1e-3 if slow else 1e-4, abs_tol=1e-2 if name == "log_ratio" else 1e-6)
        if a != e and not (rounded and close):
            lines.append(f"statistics {name}: {a} not {e}")
    return lines
