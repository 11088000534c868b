"""Megatron's model over TransformerEngine's layers, in one process: names, weights, log-probs and gradients."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import transformer_engine_torch as tex
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from safetensors.torch import load_file
from test_model_logprob import pack as pack_exactly
from test_model_logprob import random_sequences
from tiny_models import megatron_model, trainer_log_probs

from megatron_fipo.checkpoint.hf import export_hf_weights
from megatron_fipo.compat import te_cpu
from megatron_fipo.data.packing import PackedBatch, pack
from megatron_fipo.data.samples import Sample
from megatron_fipo.model.fp8_training import BACKWARD
from megatron_fipo.model.logprob import packed_log_probs
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import SamplingParams

VOCAB = 93
TE, LOCAL = "--transformer-impl transformer_engine --bf16", "--transformer-impl local --bf16"
CUSTOM = "transformer_engine.pytorch.custom_recipes.reference_current_scaling.current_scaling_ref_factory"
RECIPES = {
    "tensorwise": "--fp8-format e4m3 --fp8-recipe tensorwise",
    "tensorwise hybrid": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
    "custom": f"--fp8-format e4m3 --fp8-recipe custom --fp8-quantizer-factory {CUSTOM}",
}


@contextlib.contextmanager
def model_parallel(tp: int = 1, cp: int = 1) -> Iterator[None]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()


def build(folder: Path, flags: str) -> list:
    te_cpu.pass_for("blackwell" if "mxfp8" in flags else "hopper")
    return megatron_model(folder, *flags.split())


def samples(lengths: list[int], seed: int = 0) -> list[Sample]:
    """Random sequences whose last two thirds are the response."""
    made = []
    for number, tokens in enumerate(random_sequences(lengths, VOCAB, seed)):
        tokens = torch.tensor(tokens, dtype=torch.int32).numpy()
        made.append(
            Sample(
                prompt_id=number,
                group_id=number,
                tokens=tokens,
                rollout_logp=torch.zeros(len(tokens)).numpy(),
                response_mask=(torch.arange(len(tokens)) >= len(tokens) // 3).numpy(),
                finish_reason="stop",
                weight_versions=(),
                reward=0.0,
                correct=False,
            )  # fmt: skip
        )
    return made


def packed(lengths: list[int], alignment: int = 1, pack_alignment: int = 1) -> PackedBatch:
    return pack(samples(lengths), range(len(lengths)), torch.ones(len(lengths)), None, alignment, pack_alignment)


def log_probs(model: list, batch: PackedBatch, **kwargs) -> torch.Tensor:
    """Of one micro-batch, the first since the weights have changed."""
    model[0].set_is_first_microbatch()
    return packed_log_probs(model[0], batch, temperature=1.0, vocab_size=VOCAB, **kwargs)


def with_gradients(model: list, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and the gradients of a random sum of them by HF name."""
    logp_T = log_probs(model, batch)
    upstream_T = torch.randn(len(logp_T), generator=torch.Generator().manual_seed(5))
    (logp_T * upstream_T).sum().backward()
    with torch.no_grad():
        weights = [parameter.detach().clone() for parameter in model[0].parameters()]
        for parameter in model[0].parameters():
            parameter.copy_(parameter.grad)
            parameter.grad = None
        gradients = {name: grad.float().clone() for name, grad in export_hf_weights(model, VOCAB)}
        for parameter, weight in zip(model[0].parameters(), weights, strict=True):
            parameter.copy_(weight)
    return logp_T.detach(), gradients


def relative_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    squares = [(float((found[k] - expected[k]).square().sum()), float(expected[k].square().sum())) for k in expected]
    return (sum(gap for gap, _ in squares) / sum(size for _, size in squares)) ** 0.5


def check_names(folder: Path, fused: tuple[str, ...]) -> None:
    """Norms are fused into the linear layers behind them; dist-checkpoints hold the same under the same names."""
    te, local = (build(folder, flags)[0] for flags in (TE, LOCAL))
    names = [{name for name, _ in model.named_parameters()} for model in (te, local)]
    added = {name.split(".", 3)[3] for name in names[0] - names[1]}
    assert added == {f"{layer}.layer_norm_weight" for layer in fused}
    shapes = [
        {value.key: getattr(value, "global_shape", None) for value in nested_values(model.sharded_state_dict())}
        for model in (te, local)
    ]
    assert shapes[0] == shapes[1] and len(shapes[0]) >= 10
    te.load_state_dict(te.state_dict())  # strictly


def check_hf_weights(folder: Path) -> None:
    """What is read from a Hugging Face folder is written again bit by bit."""
    expected = load_file(folder / "model.safetensors")
    for flags in (TE, f"{TE} {RECIPES['blockwise']}"):
        exported = dict(export_hf_weights(build(folder, flags), VOCAB))
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[name], expected[name]) for name in expected)


def check_bf16(folder: Path) -> None:
    batch = packed([17, 49, 65])
    (te_logp_T, te_gradients), (logp_T, gradients) = (
        with_gradients(build(folder, flags), batch) for flags in (TE, LOCAL)
    )
    assert 0 < float((te_logp_T - logp_T).abs().max()) < 0.05
    assert relative_gap(te_gradients, gradients) < 0.03


def check_recipe(folder: Path, recipe: str) -> None:
    """FP8 is noise on log-probs and gradients; a backward pass in BF16 leaves the log-probs and makes less of it."""
    batch = packed([17, 49, 65], pack_alignment=128)
    expected_T, expected = with_gradients(build(folder, TE), batch)
    forward, gap = {}, {}
    for backward in BACKWARD:
        if (recipe, backward) == ("custom", "dequantized"):
            continue  # this factory's tensors cannot be dequantized
        model = build(folder, f"{TE} {RECIPES[recipe]} --fp8-backward {backward}")
        forward[backward], gradients = with_gradients(model, batch)
        gap[backward] = relative_gap(gradients, expected)
    noise_T = (forward["native"] - expected_T)[batch.response_mask_T].abs()
    assert 0.01 < float(noise_T.mean()) < 0.1 and float(noise_T.max()) < 0.6, noise_T
    assert all(torch.equal(found_T, forward["native"]) for found_T in forward.values())
    assert 0.1 < gap["high-precision"] < gap["native"] < 0.3, gap
    assert 0.1 < gap.get("dequantized", 0.15) < gap["native"], gap


def check_same_log_probs_without_gradients(folder: Path, recipe: str) -> None:
    """As old log-probs are computed; and again with FP8 weights that are kept since the first micro-batch."""
    model, batch = build(folder, f"{TE} {RECIPES[recipe]}"), packed([33, 31], pack_alignment=32)
    with torch.no_grad():
        old_T, _ = log_probs(model, batch, with_entropy=True)
        kept_T = packed_log_probs(model[0], batch, temperature=1.0, vocab_size=VOCAB)
    new_T = log_probs(model, batch)
    new_T.sum().backward()
    again_T = packed_log_probs(model[0], batch, temperature=1.0, vocab_size=VOCAB)
    assert torch.equal(old_T, kept_T) and torch.equal(old_T, new_T) and torch.equal(old_T, again_T)


def check_alignments(folder: Path, recipe: str) -> None:
    """Packs of any lengths run if they are filled up, and what fills them changes nothing; others are refused."""
    model = build(folder, f"{TE} {RECIPES[recipe]}")
    multiple = 32 if recipe == "mxfp8" else 16
    for lengths in ([2], [8, 3], [17, 17, 17], [33, 100], [31, 2, 64], [97]):
        batches = [packed(lengths, pack_alignment=p) for p in (multiple, 3 * multiple, 128)]
        found = []
        for batch in batches:
            assert len(batch.tokens_T) % multiple == 0
            logp_T = log_probs(model, batch)
            logp_T.sum().backward()
            found.append(logp_T.detach()[batch.response_mask_T])
        gaps = [float((other - found[0]).abs().mean()) for other in found[1:]]
        # Attention pads sequences to a common length, which rounds differently; one scale is that of all positions.
        assert max(gaps) < (0.05 if recipe == "tensorwise" else 0.02), (lengths, gaps)
    for total in (multiple - 1, multiple + 8):
        try:
            log_probs(model, pack_exactly(random_sequences([total + 1], VOCAB))).sum().backward()
        except (ValueError, RuntimeError, AssertionError) as error:
            assert "multiple" in str(error) or "divisible" in str(error), error
        else:
            raise AssertionError(f"{total} positions were not refused")


def quantized_weights(model: list) -> set[tuple[int, ...]]:
    """Shapes of the parameters that are quantised in a forward pass."""
    storages = {parameter.data_ptr(): tuple(parameter.shape) for parameter in model[0].parameters()}
    found = set()

    def recording(tensor, *args, **kwargs):
        found.add(storages.get(tensor.data_ptr()))
        return quantize(tensor, *args, **kwargs)

    quantize = tex.quantize
    with mock.patch.object(tex, "quantize", recording), torch.no_grad():
        log_probs(model, packed([33], pack_alignment=32))
    return found - {None}


def check_what_is_quantized(dense: Path, moe: Path) -> None:
    """The linear layers of the blocks, all of them, and nothing else: neither output layer, embedding nor router."""
    for folder in (dense, moe):
        model = build(folder, f"{TE} {RECIPES['blockwise']}")
        linear = {
            tuple(parameter.shape)
            for name, parameter in model[0].named_parameters()
            if ".linear_" in name and parameter.dim() == 2
        }
        assert quantized_weights(model) == linear
        model = build(folder, f"{TE} {RECIPES['blockwise']} --first-last-layers-bf16 --num-layers-at-end-in-bf16 2")
        assert quantized_weights(model) == set()
        batch = packed([33], pack_alignment=32)
        assert torch.equal(log_probs(model, batch), log_probs(build(folder, TE), batch))


def check_generation(folder: Path, recipe: str) -> None:
    """Samples come from the FP8 policy: their log-probs are nearer to the trainer's in FP8 than to those in BF16.

    Not equal: attention over a cache rounds differently in BF16, which moves some values to the next FP8 number.
    """
    plain, model = build(folder, TE), build(folder, f"{TE} {RECIPES[recipe]}")
    prompts = random_sequences([5, 1, 17, 9, 9, 30, 2], VOCAB)
    sampling = SamplingParams(24, stop_token_ids=(7, 8, 9, 10))
    with torch.no_grad():  # the FP8 weights of other values, kept for later micro-batches
        log_probs(model, packed([33], pack_alignment=32))
        for parameter, other in zip(model[0].parameters(), plain[0].parameters(), strict=True):
            parameter.copy_(1.25 * other)
            other.copy_(parameter)
    completions = EmbeddedEngine(model, VOCAB, max_batch=5, pad_id=0).generate(prompts, range(7), sampling)
    assert len({len(completion.tokens) for completion in completions}) > 2
    gaps = {"fp8": [], "bf16": []}
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = [*prompt, *completion.tokens]
        sample = Sample(
            prompt_id=0, group_id=0, tokens=torch.tensor(tokens, dtype=torch.int32).numpy(),
            response_mask=(torch.arange(len(tokens)) >= len(prompt)).numpy(),
            rollout_logp=torch.zeros(len(tokens)).numpy(), finish_reason="stop", weight_versions=(), reward=0.0,
            correct=False,
        )  # fmt: skip
        batch = pack([sample], [0], torch.ones(1), pack_alignment=32)
        with torch.no_grad():
            fp8_T = log_probs(model, batch)[batch.response_mask_T]
        gaps["fp8"].append(fp8_T - torch.tensor(completion.logp))
        gaps["bf16"].append(trainer_log_probs(plain, prompt, completion, 1.0, VOCAB) - torch.tensor(completion.logp))
    fp8, bf16 = (float(torch.cat(gap).abs().mean()) for gap in gaps.values())
    assert fp8 < 0.7 * bf16, (fp8, bf16)


def cases(folder: Path) -> dict:
    dense, moe = folder / "qwen3", folder / "qwen3_moe"
    return {
        "names": lambda: check_names(dense, ("self_attention.linear_qkv", "mlp.linear_fc1")),
        "names with experts": lambda: check_names(moe, ("self_attention.linear_qkv", "mlp.linear_fc1")),
        **{
            f"Hugging Face weights {family}": lambda family=family: check_hf_weights(folder / family)
            for family in ("qwen2", "qwen3", "qwen3_moe")
        },
        "bf16": lambda: check_bf16(dense),
        **{f"recipe {recipe}": lambda recipe=recipe: check_recipe(dense, recipe) for recipe in RECIPES},
        **{
            f"without gradients {recipe}": lambda recipe=recipe: check_same_log_probs_without_gradients(dense, recipe)
            for recipe in RECIPES
        },
        **{
            f"alignments {recipe}": lambda recipe=recipe: check_alignments(dense, recipe)
            for recipe in ("tensorwise", "blockwise", "mxfp8")
        },
        "what is quantised": lambda: check_what_is_quantized(dense, moe),
        **{
            f"generation {recipe}": lambda recipe=recipe: check_generation(dense, recipe)
            for recipe in ("blockwise", "mxfp8")
        },
    }
