"""The forecast against counts made by hand and against real models."""

import json
import sys
from pathlib import Path

import pytest

from megatron_fipo.errors import UserError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import plan_run  # noqa: E402


@pytest.fixture
def plan(tmp_path, capsys):
    """plan(*flags, code=0) -> the numbers of the command."""

    def run(*flags: object, code: int = 0) -> dict:
        assert plan_run.main([*map(str, flags), "--json", str(tmp_path / "plan.json")]) == code
        out = capsys.readouterr().out
        assert ("DOES NOT FIT" in out) == (code == 1) and "an estimate, assuming: " in out
        return json.loads((tmp_path / "plan.json").read_text())

    return run


def test_parameters_by_hand():
    """Qwen2.5-32B: 64 layers of 36,700,160 + 7,168 (q, k, v), 26,214,400 (o), 424,673,280 (MLP), 10,240 (norms); twice
    152,064 x 5,120; a last norm of 5,120. 7B likewise is what its model card rounds to 7.61 B."""
    layer = 36_700_160 + 7_168 + 26_214_400 + 424_673_280 + 10_240
    assert plan_run.MODELS["qwen2.5-32b"].parameters == 64 * layer + 2 * 778_567_680 + 5_120 == 32_763_876_352
    assert plan_run.MODELS["qwen2.5-7b"].parameters == 7_615_616_512
    assert plan_run.MODELS["qwen3-8b"].parameters == pytest.approx(8.19e9, rel=1e-3)
    assert plan_run.MODELS["qwen3-32b"].parameters == pytest.approx(32.76e9, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "settings"), [("qwen2", {}), ("qwen3", {}), ("qwen3_moe", {"mlp_only_layers": None})]
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_folder_are_those_of_the_model(hf_model, family, settings, tied):
    folder, model = hf_model(family, tied=tied, **settings)
    assert plan_run.Architecture.of_hf(folder).parameters == sum(p.numel() for p in model.parameters())


def test_dense_layers_among_mixtures_are_refused(hf_model):
    with pytest.raises(UserError, match="dense layers among those with experts"):
        plan_run.Architecture.of_hf(hf_model("qwen3_moe", tied=False)[0])


def test_the_32b_recipe_on_16_nodes(plan):
    """By hand: 4.095e9 parameters a GPU; a token's activations 231,424 bytes a layer, its layer input 10,240, over 8
    GPUs; keys and values 64 layers x 2 x 128 x 2 bytes = 32 KiB a token; 70.8e9 forward operations a token."""
    result = plan("--preset", "fipo-32b", "--gpus", 128)
    assert result["layout"] == {"tensor": 8, "pipeline": 1, "context": 1, "data": 16, "expert": 1}
    batch, memory = result["batch"], result["memory_gb"]
    assert (batch["samples_per_step"], batch["updates_per_step"], batch["samples_per_replica_and_update"]) == (
        8192,
        8,
        64,
    )
    by_hand = {
        "weights (bf16)": 8.19,
        "gradients (fp32)": 16.38,
        "optimizer (fp32 weights and moments, sharded)": 3.07,
        plan_run.NONE: 32768 * 64 * 28_928 / 1e9,
        plan_run.FULL: 32768 * (64 * 1_280 + 28_928) / 1e9,
        plan_run.LOG_PROBS: (3 * 64 * 2**20 + 2 * 32768 * 10_240 + 4 * 778_567_680 / 8) / 1e9,
        plan_run.KV_ROW: 22_528 * 32_768 / 1e9,
        plan_run.KV: 48 * 22_528 * 32_768 / 1e9,
    }
    assert {name: memory[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-3)
    assert memory["peak"] == pytest.approx(8.19 + 16.38 + 3.07 + 5 + 35.43, rel=1e-3)
    forward = 8192 * 10_440 * 70.82e9 / (128 * 989.4e12 * 0.35)
    assert result["seconds_per_step"]["old log-probs"] == pytest.approx(forward, rel=1e-3)
    assert result["seconds_per_step"]["updates"] == pytest.approx(3 * forward, rel=1e-3)
    # 8,192 / 0.6 samples over 16 replicas are 18 waves of 48; a token takes 64 x 0.2 ms, more than its memory traffic
    assert result["seconds_per_step"]["rollout (embedded, in waves)"] == pytest.approx(18 * 20_480 * 0.0128)


def test_what_the_scripts_say_about_their_clusters(plan):
    """Two nodes for 32B with 32 rows, not with 48, nor one node; 7B on one node with 96 rows."""
    plan("--gpus", 16, "--rollout-max-running", 32)
    assert plan("--gpus", 16, "--rollout-max-running", 48, code=1)["rows_that_fit"] in range(32, 48)
    plan("--gpus", 8, "--rollout-max-running", 1, code=1)
    small = ("--preset", "fipo-7b", "--rollout-max-running", 96)
    assert plan(*small, "--gpus", 8)["layout"]["data"] == 4
    plan(*small, "--gpus", 32)


def test_the_mixture_of_experts_on_4_nodes(plan):
    """Qwen3-30B-A3B by hand: a layer's attention 18,874,368 (q, k, v, o) and 256 (norms), its router 262,144, its norms
    4,096, each of 128 experts 4,718,592; twice 311,164,928 (embedding, output), a last norm of 2,048. On a GPU are 16
    experts a layer, of which 4 copies exist, and a quarter of the rest, in 8 copies."""
    rest, experts = 48 * (18_874_368 + 256 + 262_144 + 4_096) + 2 * 311_164_928, 48 * 128 * 4_718_592
    assert plan_run.MODELS["qwen3-30b-a3b"].parameters == rest + experts + 2_048 == 30_532_122_624
    layout = ("--model", "qwen3-30b-a3b", "--tensor-model-parallel-size", 4, "--expert-model-parallel-size", 8)
    memory = plan(*layout, "--gpus", 32)["memory_gb"]
    assert memory["weights (bf16)"] == pytest.approx(2 * (rest / 4 + experts / 8) / 1e9)
    optimizer = 12 * (rest / 4 / 8 + experts / 8 / 4) / 1e9
    assert memory["optimizer (fp32 weights and moments, sharded)"] == pytest.approx(optimizer)
    # a row reads 8 of 128 experts, very many rows all of them
    model = plan_run.MODELS["qwen3-30b-a3b"]
    assert model.read_to_decode(1) == pytest.approx(rest + experts / 16 + 2_048)
    assert model.read_to_decode(10_000) == pytest.approx(model.parameters)


def test_stages_and_context_share_what_one_replica_holds(plan):
    whole = plan("--gpus", 128, "--recompute", "none", code=1)["memory_gb"]
    cut = plan("--gpus", 128, "--pipeline-model-parallel-size", 2, "--context-parallel-size", 2)["memory_gb"]
    assert cut[plan_run.NONE] == pytest.approx(whole[plan_run.NONE] / 2)
    assert cut["weights (bf16)"] == pytest.approx(whole["weights (bf16)"] / 2, rel=1e-5)  # each end has an embedding
    # half the weights over half as many ranks: four replicas of two context-parallel ranks instead of 16
    name = "optimizer (fp32 weights and moments, sharded)"
    assert cut[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpus", 12), "--gpus 12 is no multiple of tensor x pipeline x context = 8"),
        (("--gpus", 128, "--tensor-model-parallel-size", 16), "--tensor-model-parallel-size 16 does not divide 40"),
        (
            ("--gpus", 32, "--model", "qwen3-30b-a3b", "--expert-model-parallel-size", 3),
            "--expert-model-parallel-size 3",
        ),
        (("--gpus", 24), "1024 samples of an update do not divide over 3 replicas"),
        (("--gpus", 8, "--preset", "quickstart"), "--preset quickstart names no model"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, words, capsys):
    assert plan_run.main([*map(str, flags)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"plan_run: {words}") and err.count("\n") == 1 and out == ""
