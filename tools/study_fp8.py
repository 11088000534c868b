"""What FP8 does to FIPO: a written rollout replayed in BF16, FP32 and each FP8 recipe, and d, F and f compared.

    torchrun ... -m megatron_fipo.train ... --rollout-only ROLLOUTS
    torchrun ... -m megatron_fipo.train ... --train-from-rollouts ROLLOUTS --save-hf UPDATED
    .venv-te/bin/python tools/study_fp8.py --hf-model DIR --updated UPDATED --rollouts ROLLOUTS

DIR is the model that wrote the rollout, UPDATED the same after its updates. Both run over the rollout's tokens in every
recipe, which gives two ratios to compare with BF16's: old and new log-probs by the same recipe, as the trainer computes
them, and old ones in BF16 under new ones in FP8, as they would come from elsewhere. One process; on a GPU by
TransformerEngine itself, without one by the emulation of `make te-cpu`. docs/fp8_noise.md says what came out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fipo import compat
from megatron_fipo.compat import te_cpu
from megatron_fipo.errors import UserError

try:
    if not torch.cuda.is_available():
        te_cpu.install()
except ModuleNotFoundError as error:
    sys.exit(f"study_fp8: {error}")
compat.install()  # before anything of Megatron is used

from safetensors.numpy import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_fipo.arguments import build_parser, platform_defaults, validate_megatron  # noqa: E402
from megatron_fipo.checkpoint.hf import load_hf_weights  # noqa: E402
from megatron_fipo.data.packing import PackedBatch, pack  # noqa: E402
from megatron_fipo.loss import FipoConfig, group_advantage  # noqa: E402
from megatron_fipo.loss.noise import Responses, budget, compare, spread, weight_edge  # noqa: E402
from megatron_fipo.model.build import model_provider  # noqa: E402
from megatron_fipo.model.hf_config import architecture  # noqa: E402
from megatron_fipo.model.logprob import packed_log_probs  # noqa: E402
from megatron_fipo.observe import svg  # noqa: E402
from megatron_fipo.observe.page_style import CSS  # noqa: E402
from megatron_fipo.parallel.replicas import Replicas  # noqa: E402
from megatron_fipo.rollout.replay import read_rollout  # noqa: E402
from megatron_fipo.session import as_one_rank, initialize  # noqa: E402

RECIPES = {
    "fp32": "--transformer-impl local",  # how far BF16 itself is off
    "tensorwise": "--fp8-format e4m3 --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
}
BLACKWELL = ("mxfp8",)  # recipes that older GPUs do not have
HALF_LIVES = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
PACK_ALIGNMENT = 128  # whole blocks of every recipe


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-model", type=Path, required=True, metavar="DIR", help="the model that wrote the rollout")
    parser.add_argument("--updated", type=Path, required=True, metavar="DIR", help="the same after its updates")
    parser.add_argument("--rollouts", required=True, metavar="DIR", help="what --rollout-only wrote")
    parser.add_argument("--step", type=int, default=1, help="of the rollouts (default: 1)")
    parser.add_argument("--preset", choices=["fipo-32b", "fipo-7b"], default="fipo-32b", help="FIPO's settings")
    parser.add_argument("--temperature", type=float, default=1.0, help="that the rollout was drawn with")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="in a pack (default: 4096)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the error of F over the half-life here")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Replay:
    """Log-probs of one recipe before and after the updates, fp32 [T] on the CPU.

    repeats: the pass before the updates, done again after them, gives the same bits.
    """

    before_T: Tensor
    after_T: Tensor
    repeats: bool


def megatron_arguments(hf_dir: Path, max_tokens: int, recipe: str | None) -> argparse.Namespace:
    parser = build_parser()
    parser.set_defaults(**platform_defaults() | architecture(hf_dir))
    parser.set_defaults(bf16=recipe != "fp32", seq_length=max_tokens, train_iters=1, lr=1e-6, min_lr=0.0)
    args = parser.parse_args(RECIPES[recipe].split() if recipe else [])
    args.rank, args.world_size = 0, 1
    args.max_position_embeddings = max(args.max_position_embeddings, max_tokens)
    validate_megatron(args)
    return args


def read_batches(ours: argparse.Namespace) -> tuple[list[PackedBatch], Responses]:
    """The rollout in packs, and its responses as the loss wants them, all of them one after the other."""
    table = Path(ours.rollouts) / f"step_{ours.step:07d}" / "table.safetensors"
    if not table.is_file():
        raise UserError(f"--rollouts {ours.rollouts} has no {table.parent.name}: give a folder of --rollout-only")
    numbers = load_file(table)
    rollout = read_rollout(
        ours.rollouts, ours.step, len(numbers["kept"]), numbers["table"].shape[1], Replicas.current()
    )
    advantage_S = group_advantage(rollout.reward_S, rollout.group_ids_S)
    packs: list[list[int]] = [[]]
    filled = 0
    for number, length in enumerate(rollout.packed_length_S.tolist()):
        if packs[-1] and filled + length > ours.max_tokens:
            packs.append([])
            filled = 0
        packs[-1].append(number)
        filled += length
    batches = [
        pack([rollout.held[i] for i in ids], ids, advantage_S[ids], pack_alignment=PACK_ALIGNMENT) for ids in packs
    ]
    ends = [batch.cu_seqlens_padded_S1.diff() for batch in batches]
    cu_seqlens_S1 = torch.nn.functional.pad(torch.cat(ends).cumsum(0), (1, 0))
    mask_T = torch.cat([batch.response_mask_T for batch in batches])
    return batches, Responses(mask_T, cu_seqlens_S1, torch.cat([batch.advantage_S for batch in batches]))


@torch.no_grad()
def replay(ours: argparse.Namespace, batches: Sequence[PackedBatch], recipe: str | None) -> Replay:
    """Both models' log-probs in a recipe; None: in BF16."""
    if te_cpu.is_installed():
        te_cpu.pass_for("blackwell" if recipe in BLACKWELL else "hopper")
    args = megatron_arguments(ours.hf_model, ours.max_tokens, recipe)
    device = Replicas.current().device
    model = model_provider(args)().to(device)

    def log_probs(hf_dir: Path) -> Tensor:
        load_hf_weights([model], hf_dir)
        passes = []
        for batch in batches:
            model.set_is_first_microbatch()  # TransformerEngine keeps quantised weights until it is told so
            logp_T = packed_log_probs(model, batch.to(device), temperature=ours.temperature, vocab_size=args.vocab_size)
            assert isinstance(logp_T, Tensor)
            passes.append(logp_T.cpu())
        return torch.cat(passes)

    before_T = log_probs(ours.hf_model)
    return Replay(before_T, log_probs(ours.updated), torch.equal(before_T, log_probs(ours.hf_model)))


def study(ours: argparse.Namespace) -> dict[str, Any]:
    """What --json holds."""
    as_one_rank()
    initialize(megatron_arguments(ours.hf_model, ours.max_tokens, None))
    batches, responses = read_batches(ours)
    config = FipoConfig.preset(ours.preset)
    mask_T = responses.response_mask_T
    bf16 = replay(ours, batches, None)
    expected = responses.terms(bf16.after_T, bf16.before_T, config)
    capable = te_cpu.is_installed() or torch.cuda.get_device_capability() >= te_cpu.GPUS["blackwell"]
    rows = {}
    for recipe in RECIPES:
        if recipe in BLACKWELL and not capable:
            continue
        found = replay(ours, batches, recipe)
        same_T = (found.after_T - found.before_T) - (bf16.after_T - bf16.before_T)
        elsewhere_T = found.before_T - bf16.before_T
        rows[recipe] = {
            "log_prob": spread(elsewhere_T[mask_T]),
            "repeats": found.repeats,
            "same": compare(responses.terms(found.after_T, found.before_T, config), expected, config),
            "elsewhere": compare(responses.terms(found.after_T, bf16.before_T, config), expected, config),
            "first_update": {
                "same": active_share(responses.terms(found.before_T, found.before_T, config).f_R),
                "elsewhere": active_share(responses.terms(found.before_T, bf16.before_T, config).f_R),
            },
            "budget_same": [budget(same_T, responses, config, half_life) for half_life in HALF_LIVES],
            "budget_elsewhere": [budget(elsewhere_T, responses, config, half_life) for half_life in HALF_LIVES],
        }
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, emulated",
        "response_tokens": int(mask_T.sum()),
        "preset": ours.preset,
        "edge": weight_edge(config),
        "bf16": {"d": spread(expected.d_R), "F": spread(expected.F_R), "active": active_share(expected.f_R)},
        "recipes": rows,
    }


def active_share(f_R: Tensor) -> float:
    """Share of tokens whose weight is not 1."""
    return (f_R != 1).double().mean().item()


def table(found: dict[str, Any]) -> str:
    """The main figures, as Markdown."""
    edge, at = found["edge"], HALF_LIVES.index(32.0)
    lines = [
        f"{found['response_tokens']:,} response tokens ({found['device']}); edge of f at |F| = {edge:.3f}; in BF16 d "
        f"spreads by {found['bf16']['d']['std']:.4f}, {found['bf16']['active']:.0%} of the weights are not 1",
        "",
        "| | log-prob: mean, std, max | d: std | f: std | f changed | other side of the ratio clip "
        "| F / edge: here, in long responses | first update: f != 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, row in found["recipes"].items():
        logp = row["log_prob"]
        for kind in ("same", "elsewhere"):
            label = f"{recipe}, old_logp {'by the same recipe' if kind == 'same' else 'in BF16'}"
            here = row[f"budget_{kind}"][at]
            lines.append(
                f"| {label} | {logp['mean']:+.4f}, {logp['std']:.4f}, {logp['max']:.2f} | {row[kind]['d']['std']:.4f} "
                f"| {row[kind]['f']['std']:.4f} | {row[kind]['weight_changed']:.1%} | {row[kind]['ratio_clip']:.1%} "
                f"| {here['rms'] / edge:.2f}, {here['long'] / edge:.2f} "
                f"| {row['first_update'][kind]:.1%} |"
            )
    return "\n".join(lines)


def draw(found: dict[str, Any]) -> str:
    """RMS error of F in long responses over the half-life, as a file of its own."""
    lines = [svg.Line("edge of f", HALF_LIVES, [found["edge"]] * len(HALF_LIVES), color=7)]
    for number, (recipe, row) in enumerate(found["recipes"].items()):
        for kind, marked in (("same", True), ("elsewhere", False)):
            rms = [entry["long"] for entry in row[f"budget_{kind}"]]
            name = f"{recipe}, old_logp {'by the same recipe (dots)' if kind == 'same' else 'in BF16'}"
            lines.append(svg.Line(name, HALF_LIVES, rms, color=number, markers=marked))
    chart = svg.Chart("error of F", x_title="half-life", from_zero=True, lines=lines)
    height = svg.HEIGHT + 16 * len(lines) + 12
    keys = ""
    for row, line in enumerate(lines):
        y, fill = svg.HEIGHT + 22 + 16 * row, f'style="fill:var(--c{line.color})"'
        keys += f'<rect x="{svg.LEFT}" y="{y - 5}" width="12" height="3" {fill}/>'
        keys += f'<text class="tick" x="{svg.LEFT + 18}" y="{y}">{line.name}</text>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 0 {svg.WIDTH + 16} {height}" '
    body = svg.draw(chart).replace(f'<svg viewBox="0 0 {svg.WIDTH} {svg.HEIGHT}" ', opening, 1)
    return body.replace(">", f"><style>{CSS}</style>", 1).replace("</svg>", f"{keys}</svg>")


def main(argv: Sequence[str]) -> int:
    ours = parse(argv)
    try:
        found = study(ours)
    except UserError as error:
        print(f"study_fp8: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if ours.json:
        ours.json.write_text(json.dumps(found, indent=1) + "\n")
    if ours.svg:
        ours.svg.write_text(draw(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
