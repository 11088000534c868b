"""The same rollout trained in every parallel layout: the same losses, gradient norms, metrics and weights.

Three updates on one rollout, FIPO active in two of them, through train.main with the flags that a user gives.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from written_rollouts import GROUP_SIZE, GROUPS, written_rollout

from megatron_fipo.data.planning import plan_step
from megatron_fipo.model.cost import CostModel

UPDATES = 3
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
SP, EP, ETP = "--sequence-parallel", "--expert-model-parallel-size", "--expert-tensor-parallel-size"
FLAGS = f"""
    --preset quickstart --num-steps 1 --grpo-prompts-per-step {GROUPS} --grpo-group-size {GROUP_SIZE}
    --no-rollout-dynamic-sampling --global-batch-size {GROUPS * GROUP_SIZE // UPDATES} --rollout-max-tokens 60
    --max-prompt-tokens 20 --max-tokens-per-microbatch 96 --lr 1e-3 --adam-eps 1e-6 --lr-warmup-iters 0
    --seed 1
"""
FIPO = "--fipo-half-life 8"  # refused together with another --loss
# One sample for each of two replicas, whose interleaved pipelines want two micro-batches: one is a dummy.
FEW = "--train-from-rollouts {runs}/few --grpo-prompts-per-step 4 --grpo-group-size 2 --global-batch-size 2"
# name: ranks and flags. Every layout also cuts the updates into micro-batches of its own.
DENSE = {
    "one": (1, ""),
    "TP2": (2, f"{TP} 2"),
    "TP2 SP": (2, f"{TP} 2 {SP}"),
    "PP2": (2, f"{PP} 2"),
    "VPP2": (2, f"{PP} 2 --num-virtual-stages-per-pipeline-rank 2"),
    "CP2": (2, f"{CP} 2"),
    "CP4": (4, f"{CP} 4"),
    "DP2": (2, ""),
    "DP2 overlap": (2, "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4096"),
    "TP2 DP2": (4, f"{TP} 2 {SP}"),
    "CP2 DP2": (4, f"{CP} 2"),
    "TP2 CP2": (4, f"{TP} 2 {SP} {CP} 2"),
    "PP2 CP2": (4, f"{PP} 2 {CP} 2"),
    "PP2 DP2 overlap": (4, f"{PP} 2 --overlap-grad-reduce --overlap-param-gather"),
    "recompute": (2, f"{CP} 2 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "corrected": (1, "--rollout-correction token-tis:1.2 sequence-mask:0.9:1.1 --loss-normalization group"),
    "corrected CP2 DP2": (
        4,
        f"--rollout-correction token-tis:1.2 sequence-mask:0.9:1.1 --loss-normalization group {CP} 2",
    ),
    "group": (1, "--loss-normalization group"),
    "group CP2 DP2": (4, f"--loss-normalization group {CP} 2"),
    "sequence": (1, "--loss-normalization sequence"),
    "sequence PP2 CP2": (4, f"--loss-normalization sequence {PP} 2 {CP} 2"),
    "few": (1, FEW),
    "few VPP2 DP2": (4, f"{FEW} {PP} 2 --num-virtual-stages-per-pipeline-rank 2 --overlap-grad-reduce"),
    "one micro-batch": (1, "--max-tokens-per-microbatch 4096"),
    "many micro-batches": (1, "--max-tokens-per-microbatch 1"),
}
# Against a reference model that is not the one that training starts from.
GSPO = "--loss gspo --grpo-clamp-eps-lower 0.01 --grpo-clamp-eps-upper 0.02"
REINFORCE = "--loss reinforce++ --return-gamma 0.97 --grpo-kl-beta 0.05 --reference-model {reference}"
PENALTIES = "--grpo-kl-beta 0.2 --grpo-entropy-term-weight 0.05 --reference-model {reference}"
OTHER_LOSSES = {
    "gspo": (1, GSPO),
    "gspo TP2 CP2": (4, f"{GSPO} {TP} 2 {SP} {CP} 2"),
    "cispo": (1, "--loss cispo --grpo-clamp-eps-upper 0.05 --advantage leave-one-out"),
    "cispo PP2 CP2": (4, f"--loss cispo --grpo-clamp-eps-upper 0.05 --advantage leave-one-out {PP} 2 {CP} 2"),
    "reinforce++": (1, REINFORCE),
    "reinforce++ CP2 DP2": (4, f"{REINFORCE} {CP} 2"),
    "reinforce++ PP2": (2, f"{REINFORCE} {PP} 2"),
    "penalties": (1, PENALTIES),
    "penalties saver": (1, f"{PENALTIES} --save-interval 1"),
    "penalties TP2 CP2": (4, f"{PENALTIES} {TP} 2 {SP} {CP} 2"),
    "penalties PP2 DP2": (4, f"{PENALTIES} {PP} 2 --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4096"),
    "resumed": (1, f"{PENALTIES} --num-steps 2"),
    "resumed CP2": (2, f"{PENALTIES} --num-steps 2 --load {{runs}}/penalties_saver/checkpoints {CP} 2"),
}
# Saved after one step in one layout, continued in another; a case on all ranks lets the savers finish first.
RESHARDED = {
    "two steps": (1, "--num-steps 2"),
    "saver TP2": (2, f"{TP} 2 {SP} --save-interval 1"),
    "saver DP2": (2, "--save-interval 1 --async-save"),
    "saver one": (1, "--save-interval 1"),
    "two steps CP4": (4, f"--num-steps 2 {CP} 4"),
    "TP2 to DP2": (2, "--num-steps 2 --load {runs}/saver_TP2/checkpoints"),
    "DP2 to PP2": (2, f"--num-steps 2 --load {{runs}}/saver_DP2/checkpoints {PP} 2"),
    "one to CP2": (2, f"--num-steps 2 --load {{runs}}/saver_one/checkpoints {CP} 2"),
    "TP2 to TP2 PP2": (4, f"--num-steps 2 --load {{runs}}/saver_TP2/checkpoints {TP} 2 {SP} {PP} 2"),
}
# Another family: biases, and one weight for embedding and output, which the first and the last stage both hold.
TIED = {
    "tied": (1, "--hf-model {runs}/tied"),
    "tied PP2 DP2": (4, f"--hf-model {{runs}}/tied {PP} 2 --overlap-grad-reduce --overlap-param-gather"),
    "tied VPP2 TP2": (4, f"--hf-model {{runs}}/tied {TP} 2 {SP} {PP} 2 --num-virtual-stages-per-pipeline-rank 2"),
}
BF16_OVERLAP = f"--bf16 {TP} 2 {SP} --overlap-grad-reduce --overlap-param-gather"
BF16 = {
    "bf16": (1, "--bf16"),
    "bf16 TP2 DP2": (4, BF16_OVERLAP),
    "bf16 TP2 DP2 reference": (4, f"{BF16_OVERLAP} --grpo-kl-beta 1e-30 --reference-model {{reference}}"),
    "bf16 PP2 CP2": (4, f"--bf16 {PP} 2 {CP} 2"),
}
MOE = {
    "one": (1, ""),
    "EP2": (2, f"{EP} 2"),
    "ETP2": (2, f"{TP} 2 {SP} {ETP} 2"),
    "EP2 CP2": (2, f"{EP} 2 {CP} 2"),
    "TP2 EP2": (2, f"{TP} 2 {SP} {EP} 2 {ETP} 1"),
    "EP2 DP4": (4, f"{EP} 2"),
    "VPP2 recompute": (
        2,
        f"{PP} 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "EP2 PP2": (4, f"{EP} 2 {PP} 2"),
    "EP2 CP2 DP2": (4, f"{EP} 2 {CP} 2 --overlap-grad-reduce --overlap-param-gather"),
    "penalties": (1, PENALTIES),
    "penalties EP2 CP2 DP2": (4, f"{PENALTIES} {EP} 2 {CP} 2 --overlap-grad-reduce --overlap-param-gather"),
}


def run_name(case: str) -> str:
    return case.replace(" ", "_")


def run_cases(
    folder: Path, hf_dir: Path, layouts: dict[str, tuple[int, str]], reference: Path | None = None
) -> dict[str, tuple[dict, dict]]:
    """Train every layout on folder/rollouts; {name: (metrics of the last step, exported weights)}."""
    cases = {
        name: {
            "ranks": ranks,
            "argv": [
                *f"--hf-model {hf_dir} --train-from-rollouts {folder / 'rollouts'} --runs-dir {folder}".split(),
                *("--run-name", run_name(name), "--save-hf", str(folder / run_name(name) / "hf")),
                *FLAGS.split(),
                *("" if "--loss " in flags else FIPO).split(),
                *flags.format(runs=folder, reference=reference).split(),
            ],
        }
        for name, (ranks, flags) in layouts.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("layout_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(worker)]
    process = subprocess.run(
        [*command, str(folder / "cases.json")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    (folder / "stderr").write_text(process.stderr)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[:6000]
    assert sorted(line.removeprefix("ran: ") for line in process.stdout.splitlines() if line.startswith("ran: ")) == (
        sorted(layouts)
    )
    return {
        name: (
            last_row(folder / run_name(name)),
            load_file(folder / run_name(name) / "hf" / "model.safetensors"),
        )
        for name in layouts
    }


def last_row(run: Path) -> dict:
    """The metrics of the last step, with the influence weights that it left of single samples."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) | {
        "samples": [sample["influence"] for sample in samples]
    }


def check_equal(found: tuple[dict, dict], expected: tuple[dict, dict], name: str, tolerance: float = 1e-5) -> None:
    metrics, weights = found
    expected_metrics, expected_weights = expected
    for update, reference in zip(
        [metrics, *metrics["updates"]], [expected_metrics, *expected_metrics["updates"]], strict=True
    ):
        for key, value in reference.items():
            if key.startswith(("actor/", "fipo/", "mismatch/", "correction/", "reward/", "advantage/")):
                # Quantiles come from histograms: a value may fall into the neighbouring bin.
                bin_width = 3e-3 if "_p" in key or "median" in key else 0.0
                assert update[key] == pytest.approx(value, rel=tolerance + bin_width, abs=tolerance), (name, key)
    # two of a loss with influence weights
    assert len(metrics["samples"]) == (2 if "fipo/active_fraction" in metrics else 0), name
    for weights_of_sample, expected_weights_of_sample in zip(
        metrics["samples"], expected_metrics["samples"], strict=True
    ):
        assert weights_of_sample == pytest.approx(expected_weights_of_sample, abs=3e-4), name  # written with 4 digits
    for weight, value in expected_weights.items():
        # Where a gradient is next to 0, Adam (eps 1e-6, rate 1e-3) makes 2e-5 of a rounding by 2e-8.
        gap = (weights[weight] - value).abs()
        off = int((gap > tolerance).sum())
        assert off <= 1e-3 * gap.numel() and gap.max() <= 5 * tolerance, f"{name}: {weight}: {off}, {gap.max():.1e}"


@pytest.fixture(scope="module")
def dense(megatron, hf_model, tmp_path_factory):
    folder, _ = hf_model("qwen3", tied=False, num_hidden_layers=4)
    runs = tmp_path_factory.mktemp("dense")
    for step in (1, 2):
        written_rollout(runs / "rollouts", step)
    written_rollout(runs / "few", 1, number=4, size=2)
    reference, _ = hf_model("qwen3", tied=False, num_hidden_layers=4, seed=1)
    tied, _ = hf_model("qwen2", tied=True, num_hidden_layers=4)
    (runs / "tied").symlink_to(tied)
    return run_cases(runs, folder, DENSE | TIED | OTHER_LOSSES | RESHARDED | BF16, reference)


@pytest.fixture(scope="module")
def moe(megatron, hf_model, tmp_path_factory):
    folder, _ = hf_model("qwen3_moe", tied=False, num_hidden_layers=4)
    runs = tmp_path_factory.mktemp("moe")
    written_rollout(runs / "rollouts", 1)
    reference, _ = hf_model("qwen3_moe", tied=False, num_hidden_layers=4, seed=1)
    return run_cases(runs, folder, MOE, reference)


def test_fipo_is_active_in_the_reference(dense):
    first, *later = dense["one"][0]["updates"]
    assert first["fipo/active_fraction"] == 0
    assert len(later) == 2 and all(update["fipo/active_fraction"] > 0.2 for update in later)
    assert dense["one"][0]["actor/grad_norm"] > 0.1


@pytest.mark.parametrize("layout", DENSE | TIED)
def test_a_dense_model_trains_alike_in_every_layout(layout, dense):
    kind = layout.split()[0]
    check_equal(
        dense[layout], dense[kind if kind in ("group", "sequence", "corrected", "few", "tied") else "one"], layout
    )


@pytest.mark.parametrize("layout", [name for name in OTHER_LOSSES if " " in name])
def test_other_losses_train_alike_in_every_layout(layout, dense):
    check_equal(dense[layout], dense[layout.split()[0]], layout)


def test_other_losses_are_other_losses(dense):
    """They act on the updates, and log what they have."""
    metrics = {name: dense[name][0] for name in ("one", *(name for name in OTHER_LOSSES if " " not in name))}
    del metrics["resumed"]
    assert len({m["updates"][2]["actor/grad_norm"] for m in metrics.values()}) == len(metrics)
    assert all(0 < m["updates"][2]["actor/pg_clipfrac"] < 1 for m in metrics.values())
    for name, m in metrics.items():
        assert ("actor/influence_weights_mean" in m) == ("fipo/noise_budget" in m) == (name in ("one", "penalties"))
        assert ("actor/reference_kl" in m) == (name == "penalties")
        assert ("reward/reference_kl" in m) == (name == "reinforce++")
    assert metrics["penalties"]["actor/reference_kl"] > 0.01
    assert abs(metrics["reinforce++"]["reward/reference_kl"]) > 0.01


def test_few_samples_leave_a_replica_without():
    cost = CostModel(1, 8, 8, 1, 1, 8, 8)
    (update,) = plan_step([10, 20], 2, 2, 96, cost=cost, pipeline_stages=2, micro_batch_multiple=2)
    assert all(() in micro_batches for micro_batches in update.micro_batches)


def test_normalizations_differ(dense):
    losses = {dense[name][0]["actor/pg_loss"] for name in ("one", "group", "sequence", "corrected")}
    assert len(losses) == 4
    assert dense["corrected"][0]["correction/dropped_fraction"] > 0


@pytest.mark.parametrize("layout", MOE)
def test_a_mixture_of_experts_trains_alike_in_every_layout(layout, moe):
    check_equal(moe[layout], moe["penalties" if layout.startswith("penalties") else "one"], layout)


@pytest.mark.parametrize("layout", [name for name in RESHARDED if name.startswith("two steps ") or " to " in name])
def test_a_checkpoint_continues_in_another_layout(layout, dense):
    check_equal(dense[layout], dense["two steps"], layout)


@pytest.mark.parametrize("layout", [name for name in BF16 if name != "bf16"])
def test_bf16_is_no_further_from_fp32_in_any_layout(layout, dense):
    """Weights by the norm of their difference; sums over a whole update, which cancel by luck, within a few percent."""
    (metrics, weights), (_, one_weights) = dense[layout], dense["bf16"]
    expected_metrics, expected_weights = dense["one"]

    def squared_gap(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[name].double() - value).square().sum()) for name, value in expected_weights.items())

    assert 0 < squared_gap(weights) <= 1.5**2 * squared_gap(one_weights)
    for update, expected in zip(metrics["updates"], expected_metrics["updates"], strict=True):
        for key in ("actor/pg_loss", "actor/grad_norm", "actor/influence_weights_mean"):
            assert update[key] == pytest.approx(expected[key], rel=0.05, abs=0.01), key


def test_the_reference_model_leaves_the_policy_its_bits(dense):
    """With a weight too small to act, a run in whose parameters another model has been is the run without."""
    (metrics, weights), (plain_metrics, plain_weights) = dense["bf16 TP2 DP2 reference"], dense["bf16 TP2 DP2"]
    assert metrics["actor/reference_kl"] > 0.01 and "actor/reference_kl" not in plain_metrics
    assert metrics["actor/grad_norm"] == plain_metrics["actor/grad_norm"]
    assert all(torch.equal(weights[name], value) for name, value in plain_weights.items())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_random_layouts_lengths_and_budgets(seed, megatron, hf_model, tmp_path):
    """Few samples for many ranks and small budgets: shards and micro-batches without a token of a response."""
    print("seed", seed)
    random = np.random.default_rng(seed)
    family, layouts = [("qwen3", DENSE), ("qwen3_moe", MOE)][seed % 2]
    folder, _ = hf_model(family, tied=False, num_hidden_layers=4)
    groups = int(random.integers(2, 5))
    written_rollout(tmp_path / "rollouts", 1, groups, sigma=2.0)
    flags = f"--grpo-prompts-per-step {groups} --global-batch-size {GROUP_SIZE}"
    names = random.choice([n for n in layouts if n.split()[0][:2] in ("TP", "PP", "VP", "CP", "DP", "EP", "ET")], 4)
    cases = {"one": (1, f"{flags} --max-tokens-per-microbatch 128")} | {
        name: (layouts[name][0], f"{layouts[name][1]} {flags} --max-tokens-per-microbatch {random.integers(8, 256)}")
        for name in names
    }
    results = run_cases(tmp_path, folder, cases)
    for name in names:
        check_equal(results[name], results["one"], f"seed {seed}, {cases[name]}")
