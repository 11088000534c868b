"""FIPO in Megatron-LM's own loop: numbers by Megatron's schedule, the contract by source, the check of a checkout."""

import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loss_oracle import oracle

from megatron_fipo.errors import UserError
from megatron_fipo.loss import FipoConfig, fipo_loss
from megatron_fipo.megatron_rl import fipo_loss_function

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_megatron_checkout.py"
CONTRACT = json.loads((ROOT / "tools" / "data" / "megatron_rl_contract.json").read_text())
CONFIG = FipoConfig.preset("fipo-32b")
NAN = float("nan")


def arguments(**changed) -> argparse.Namespace:
    """Megatron's, as docs/megatron_rl.md says to set them."""
    values = dict(
        calculate_per_token_loss=True, grpo_clamp_eps_lower=0.2, grpo_clamp_eps_upper=0.28, grpo_kl_beta=0.0,
        grpo_entropy_term_weight=0.0, grpo_prompts_per_step=4, grpo_group_size=4, grpo_iterations=1,
        global_batch_size=8, rl_importance_sampling_truncation_coef=None,
    )  # fmt: skip
    return argparse.Namespace(**values | changed)


def padded_batch(rows: int = 6, width: int = 40):
    """As forward_step has it: log-probs [rows, width] of tokens 1..width, mask 1 on responses, which have a hole and
    end at different places; NaN in the prompts and in the padding, where nothing may be read."""
    g = torch.Generator().manual_seed(3)
    logp = -3 * torch.rand(rows, width, generator=g)
    old = logp - 0.5 * torch.randn(rows, width, generator=g)
    mask = torch.zeros(rows, width)
    for row in range(rows):
        mask[row, 5 + row : width - 4 * row] = 1.0
    mask[1, 15:18] = 0.0
    mask[4] = 0.0  # a response that was cut away
    old[2, 20:24] = logp[2, 20:24] - 3.0  # four tokens beyond the dual clip, A < 0: the response is dropped
    advantages = torch.tensor([1.0, -0.5, -1.0, 0.7, 1.2, 0.0])
    outside = mask == 0
    return logp.masked_fill(outside, NAN), old.masked_fill(outside, NAN), mask, advantages


def expected(logp, old, mask, advantages, config, token_weight=None):
    """(loss, gradient [rows, width]) by the formulas in Python floats, over the whole mini-batch."""
    rows, width = logp.shape
    A_T = advantages.repeat_interleave(width).tolist()
    flat = [logp.reshape(-1).tolist(), old.reshape(-1).tolist(), A_T, (mask.reshape(-1) > 0).tolist()]
    weight = None if token_weight is None else token_weight.reshape(-1).tolist()
    loss, gradient, _, seen = oracle(*flat, [*range(0, rows * width + 1, width)], config, token_weight=weight)
    return loss, torch.tensor(gradient).reshape(rows, width), seen


def run(schedule_batches, width):
    """Megatron's own schedule over micro-batches; the model is the log-probs themselves. Returns the gradient divided
    once, as finalize_model_grads does, the tokens it divides by, and the reports, summed as train_step does."""
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True)
    tokens = []
    config.finalize_model_grads_func = lambda model, num_tokens, **rest: tokens.append(int(num_tokens))
    rows = torch.cat([batch["logp"] for batch in schedule_batches]).nan_to_num(7.0)
    model = torch.nn.Module()
    model.logp = torch.nn.Parameter(rows)
    model.config, model.model_type, model.set_input_tensor = config, ModelType.encoder_or_decoder, lambda tensor: None

    def forward_step(iterator, model):
        first, batch = next(iterator)
        logp = model.logp[first : first + batch["logp"].shape[0]]
        return logp, fipo_loss_function(batch["args"], batch["config"], **batch["inputs"])

    firsts = [0, *torch.tensor([batch["logp"].shape[0] for batch in schedule_batches]).cumsum(0).tolist()]
    reports = forward_backward_no_pipelining(
        forward_step_func=forward_step,
        data_iterator=iter(zip(firsts, schedule_batches, strict=False)),
        model=model,
        num_microbatches=len(schedule_batches),
        seq_length=width,
        micro_batch_size=1,
    )
    sums = {name: torch.vstack([report[name] for report in reports]).sum(dim=0) for name in reports[0]}
    return model.logp.grad / max(tokens[0], 1), tokens[0], {name: float(a / b) for name, (a, b) in sums.items()}


def batch_of(logp, old, mask, advantages, config=CONFIG, args=None, **more) -> dict:
    inputs = {"loss_mask": mask, "old_logprobs": old, "advantages": advantages, **more}
    return {"logp": logp, "config": config, "args": args or arguments(), "inputs": inputs}


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_padded_micro_batches_are_the_loss_of_the_mini_batch(megatron, size):
    logp, old, mask, advantages = padded_batch()
    parts = zip(*(values.split(size) for values in (logp, old, mask, advantages)), strict=True)
    gradient, tokens, report = run([batch_of(*part) for part in parts], logp.shape[1])
    loss, wanted, seen = expected(logp, old, mask, advantages, CONFIG)
    assert "dropped" in seen
    assert tokens == int(mask.sum() - mask[2].sum())
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    assert report["lm loss"] == pytest.approx(loss, rel=1e-5)
    flat = (values.reshape(-1) for values in (logp, old))
    cu_seqlens = torch.arange(0, logp.numel() + 1, logp.shape[1])
    metrics = fipo_loss(*flat, advantages, mask.reshape(-1) > 0, cu_seqlens, CONFIG, backend="torch").metrics
    assert {name: metrics[name] for name in report if "/" in name} == pytest.approx(
        {name: value for name, value in report.items() if "/" in name}, rel=1e-5
    )
    assert 0 < report["fipo/active_fraction"] < 1


def test_a_packed_bin_is_the_same_as_padded_rows(megatron):
    """Sequences back to back at aligned starts, junk between them, the end of the used part as a last start."""
    logp, old, mask, advantages = padded_batch()
    lengths = [int(row.nonzero().max()) + 2 if row.any() else 8 for row in mask]  # in tokens: log-probs are one fewer
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + -(-length // 4) * 4)
    width = starts[-1] + 11
    bins = {name: torch.full((1, width), NAN) for name in ("logp", "old")} | {"mask": torch.zeros(1, width)}
    for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        for name, values in (("logp", logp), ("old", old), ("mask", mask)):
            bins[name][0, start : start + length - 1] = values[row, : length - 1]
    packed = batch_of(*bins.values(), advantages, seq_starts=starts, seq_lengths=lengths)
    nothing = torch.zeros(1, width)
    empty = batch_of(nothing, nothing, nothing, torch.tensor([]), seq_starts=[], seq_lengths=[])
    gradient, tokens, report = run([packed, empty], width)
    loss, wanted, _ = expected(logp, old, mask, advantages, CONFIG)
    assert tokens == int(mask.sum() - mask[2].sum()) and report["lm loss"] == pytest.approx(loss, rel=1e-5)
    assert not gradient[1].any()
    for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        seen = gradient[0, start : start + length - 1]
        torch.testing.assert_close(seen, wanted[row, : length - 1], rtol=1e-5, atol=1e-7)


def test_the_gap_to_the_engine_is_corrected(megatron):
    logp, old, mask, advantages = padded_batch()
    inference = old - 0.4 * torch.randn(old.shape, generator=torch.Generator().manual_seed(9))
    args = arguments(rl_importance_sampling_truncation_coef=1.3)
    batch = batch_of(logp, old, mask, advantages, args=args, inference_logprobs=inference)
    gradient, _, report = run([batch], logp.shape[1])
    weight = (old - inference).exp().clamp(max=1.3)
    assert (weight[mask > 0] == 1.3).any() and (weight[mask > 0] < 1.3).any()
    loss, wanted, _ = expected(logp, old, mask, advantages, CONFIG, weight)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    assert report["lm loss"] == pytest.approx(loss, rel=1e-5)


def test_bf16_log_probs_become_fp32_before_their_difference(megatron):
    """What that loop makes of a bf16 model unless it runs batch-invariant."""
    logp, old, mask, advantages = padded_batch()
    logp, old = logp.bfloat16(), old.bfloat16()
    gradient, _, _ = run([batch_of(logp, old, mask, advantages)], logp.shape[1])
    _, wanted, _ = expected(logp.float(), old.float(), mask, advantages, CONFIG)
    torch.testing.assert_close(gradient.float(), wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "config", "words"),
    [
        ({"calculate_per_token_loss": False}, CONFIG, "--calculate-per-token-loss is missing"),
        ({"grpo_clamp_eps_lower": 0.01}, CONFIG, "--grpo-clamp-eps-lower 0.01 .* give --grpo-clamp-eps-lower 0.2"),
        ({"grpo_kl_beta": 0.001}, CONFIG, "--grpo-kl-beta 0.001"),
        ({"grpo_entropy_term_weight": 0.1}, CONFIG, "--grpo-entropy-term-weight 0.1"),
        ({"global_batch_size": 16}, CONFIG, "--global-batch-size to at most 8"),
        ({}, FipoConfig(normalization="group"), "normalization 'group'"),
    ],
)
def test_flags_that_would_train_something_else_are_refused(changed, config, words):
    logp, old, mask, advantages = padded_batch()
    with pytest.raises(UserError, match=words):
        fipo_loss_function(arguments(**changed), config, loss_mask=mask, old_logprobs=old, advantages=advantages)


def test_one_update_a_rollout_is_fine_for_dapo():
    _, old, mask, advantages = padded_batch()
    args, config = arguments(global_batch_size=16), FipoConfig.preset("dapo")
    fipo_loss_function(args, config, loss_mask=mask, old_logprobs=old, advantages=advantages)


def test_a_mask_of_another_shape_is_refused():
    _, old, mask, advantages = padded_batch()
    with pytest.raises(ValueError, match="loss_mask"):
        fipo_loss_function(arguments(), CONFIG, loss_mask=mask[:, 1:], old_logprobs=old, advantages=advantages)


def test_every_argument_is_a_name_that_forward_step_has():
    recorded = CONTRACT["files"]["train_rl.py"]["forward_step"]["names"]
    assert set(inspect.signature(fipo_loss_function).parameters) - {"config"} <= set(recorded)


def test_the_commit_is_named_where_people_look():
    for path in ("megatron_fipo/megatron_rl.py", "docs/megatron_rl.md"):
        assert CONTRACT["commit"] in (ROOT / path).read_text()


def check(checkout: Path, *flags: object) -> tuple[int, list[str]]:
    command = [sys.executable, str(TOOL), str(checkout), *map(str, flags)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return process.returncode, (process.stdout or process.stderr).splitlines()


def test_the_wheel_s_part_of_the_contract_holds():
    """megatron-core's wheel has schedules, division of the gradients and flags; train_rl.py is not in it."""
    import megatron.core

    site = Path(megatron.core.__file__).parents[2]
    _, lines = check(site)
    verdicts = {line.split()[1].rstrip(":"): line.split()[0] for line in lines[1:]}
    assert [file for file in CONTRACT["files"] if (site / file).is_file()] == [
        file for file, verdict in verdicts.items() if verdict == "same"
    ]
    assert "megatron/core/pipeline_parallel/schedules.py" in [f for f, v in verdicts.items() if v == "same"]


def definition(symbol: str, aspects: dict[str, list[str]]) -> str:
    """Source of a function or class that has what the contract recorded."""
    if "fields" in aspects:
        return f"class {symbol}:\n" + "".join(f"    {name}: int\n" for name in aspects["fields"])
    names = "".join(f"    {name} = 0\n" for name in aspects.get("names", []))
    returned = ", ".join("1 + 1" if name.startswith("[") else name for name in aspects.get("returned", ["None"]))
    return f"def {symbol}({', '.join(aspects.get('parameters', []))}):\n{names}    return {returned}\n"


def module(symbols: dict[str, dict[str, list[str]]]) -> str:
    own = symbols.get("module", {})
    lines = [f"from somewhere import {name}\n" for name in own.get("names", [])]
    lines += [f"parser.add_argument('{flag}', type=int)\n" for flag in own.get("flags", [])]
    return "".join([*lines, *(definition(name, asp) for name, asp in symbols.items() if name != "module")])


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small tree that has everything that the contract recorded."""
    for file, symbols in CONTRACT["files"].items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(module(symbols))
    return tmp_path


def test_a_checkout_as_recorded_passes(checkout):
    code, lines = check(checkout)
    assert code == 0 and CONTRACT["commit"][:12] in lines[0]
    assert len(lines) == 1 + sum(map(len, CONTRACT["files"].values()))
    assert all(line.startswith("same") for line in lines[1:])


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("megatron/rl/rl_utils.py", "def calculate_grpo_loss(current_logprobs, old_logprobs",
         "def calculate_grpo_loss(old_logprobs, current_logprobs",
         "changed  megatron/rl/rl_utils.py: calculate_grpo_loss - parameters: another order: old_logprobs, current"),
        ("megatron/rl/rl_utils.py", "seq_starts=None", "mask=None, seq_starts=None",
         "changed  megatron/rl/rl_utils.py: calculate_grpo_loss - parameters: new mask=None"),
        ("megatron/rl/rl_utils.py", "seq_starts=None", "seq_starts=0",
         "changed  megatron/rl/rl_utils.py: calculate_grpo_loss - parameters: gone seq_starts=None; parameters: new"),
        ("train_rl.py", "    loss_mask = 0\n", "    mask = 0\n",
         "changed  train_rl.py: forward_step - names: gone loss_mask"),
        ("train_rl.py", "return 1 + 1, 1 + 1, output_dict", "return 1 + 1, output_dict",
         "changed  train_rl.py: loss_func - returned: gone [1]"),
        ("megatron/training/arguments.py", "--grpo-kl-beta", "--rl-kl-beta",
         "changed  megatron/training/arguments.py: module - flags: gone --grpo-kl-beta"),
        ("megatron/rl/rl_utils.py", "def get_logprobs(", "def get_log_probs(",
         "missing  megatron/rl/rl_utils.py: get_logprobs - it is not defined there"),
    ],
)  # fmt: skip
def test_what_another_checkout_changed_is_said(checkout, file, old, new, line):
    source = (checkout / file).read_text()
    assert old in source
    (checkout / file).write_text(source.replace(old, new))
    code, lines = check(checkout, "--json", checkout / "findings.json")
    different = [text for text in lines[1:] if not text.startswith("same")]
    assert code == 1 and len(different) == 1 and different[0].startswith(line), different
    findings = json.loads((checkout / "findings.json").read_text())
    assert [f["verdict"] for f in findings if f["verdict"] != "same"] == [line.split()[0]]


def test_a_missing_file_and_a_wrong_folder_are_said(checkout, tmp_path_factory):
    (checkout / "train_rl.py").unlink()
    code, lines = check(checkout)
    assert code == 1 and [line for line in lines if line.startswith("missing") and "the file is not there" in line]
    code, (line,) = check(tmp_path_factory.mktemp("empty"))
    assert code == 2 and "is no Megatron-LM checkout" in line
