"""Whole runs of train.main over TransformerEngine's layers, with the flags that a user gives."""

import json
from pathlib import Path

from layout_worker import RANK, run

from megatron_fipo.compat import te_cpu

TP2, CP2 = "--tensor-model-parallel-size 2 --sequence-parallel", "--context-parallel-size 2"
REPLAY = """
    --preset quickstart --num-steps 1 --grpo-prompts-per-step 6 --grpo-group-size 4 --no-rollout-dynamic-sampling
    --global-batch-size 8 --rollout-max-tokens 60 --max-prompt-tokens 20 --max-tokens-per-microbatch 128 --lr 1e-3
    --adam-eps 1e-6 --lr-warmup-iters 0 --fipo-half-life 8 --seed 1 --train-from-rollouts {folder}/rollouts
"""
EMBEDDED = """
    --preset quickstart --num-steps 2 --grpo-prompts-per-step 8 --grpo-group-size 8 --global-batch-size 32
    --rollout-max-tokens 12 --max-tokens-per-microbatch 128 --lr 1e-3 --lr-warmup-iters 0 --seed 3
    --prompt-data {folder}/base/train.jsonl --eval-data heldout:{folder}/base/heldout.jsonl:1
"""
# name: model, flags
ALONE = {
    "bf16": ("qwen3", f"{REPLAY} --save-interval 1"),
    "blockwise": ("qwen3", f"{REPLAY} --fp8-preset hopper --save-interval 1"),
    "tensorwise": (
        "qwen3",
        f"{REPLAY} --fp8-format hybrid --fp8-recipe tensorwise --fp8-backward high-precision --first-last-layers-bf16",
    ),
    "experts": ("qwen3_moe", f"{REPLAY} --fp8-preset hopper"),
    "local": ("qwen3", f"{REPLAY} --transformer-impl local --save-interval 1"),
}
TOGETHER = {
    "blockwise TP2": ("qwen3", f"{REPLAY} --fp8-preset hopper {TP2}"),
    "blockwise CP2": ("qwen3", f"{REPLAY} --fp8-preset hopper {CP2}"),
    "mxfp8 TP2": ("qwen3", f"{REPLAY} --fp8-preset blackwell {TP2}"),
    "mxfp8 DP2": ("qwen3", f"{REPLAY} --fp8-preset blackwell --loss-normalization group"),
    "embedded": ("base", f"{EMBEDDED} --fp8-preset hopper"),
}
CONTINUED = {
    "local to blockwise": ("qwen3", f"{REPLAY} --num-steps 2 --fp8-preset hopper --load {{folder}}/local/checkpoints"),
    "blockwise to local": (
        "qwen3",
        f"{REPLAY} --num-steps 2 --transformer-impl local --load {{folder}}/blockwise/checkpoints",
    ),
}


def check(folder: Path, name: str, ranks: int, model: str, flags: str) -> None:
    """A run on this rank, or on both: it ends, and FIPO is active from the second update on, not before."""
    own = folder / name.replace(" ", "_")
    argv = f"--hf-model {folder / model} --runs-dir {folder} --run-name {own.name} --bf16 --save-hf {own}/hf"
    te_cpu.pass_for("blackwell" if "blackwell" in flags else "hopper")
    first = RANK if ranks == 1 else 0
    run(name, ranks, [*argv.split(), *flags.format(folder=folder).split()], first, folder / f"store {own.name}")
    if first != RANK:
        return
    rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["step"] > 0]
    for row in trained:
        before, *later = row["updates"]
        for metric in ("neg_is_max", "pos_is_max", "pos_is_min", "influence_weights_min", "influence_weights_max"):
            assert before[f"actor/{metric}"] == 1.0, metric
        assert before["actor/ppo_kl"] == 0.0 and before["fipo/active_fraction"] == 0.0
        assert all(update["fipo/active_fraction"] > 0.1 for update in later), later
        assert row["actor/grad_norm"] > 0
    assert trained


def cases(folder: Path, runs: dict, ranks: int) -> dict:
    return {f"run {name}": lambda name=name: check(folder, name, ranks, *runs[name]) for name in runs}
