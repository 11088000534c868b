"""The released loss's own numbers: loss, gradient and every metric, in both backends."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fipo.loss import FipoConfig, fipo_loss

GOLDEN = Path(__file__).parent.parent / "golden"
RENAMED = {
    "total_clip_frac": "IW_overall_clip_ratio",
    "clip_frac_upper": "IW_upper_clip_ratio",
    "clip_frac_lower": "IW_lower_clip_ratio",
}


def load(name):
    arrays = np.load(GOLDEN / f"{name}.npz")
    record = json.loads((GOLDEN / f"{name}.json").read_text())
    return arrays, record["config"], record["metrics"]


def config_of(settings):
    eps = settings["future_kl_clip_ratio"]
    low, high = (0.0, 10.0) if eps == 0 else (1 - eps, 1 + eps)
    if eps != 0 and settings["future_kl_clip_high_only"]:
        low = 1.0
    return FipoConfig(
        half_life=settings["decay_rate"],
        weight_low=low,
        weight_high=high,
        safety_threshold=settings["safety_thresh"],
        dual_clip=settings["dual_clip_c"],
        clip_low=settings["clip_low"],
        clip_high=settings["clip_high"],
    )


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("name", ["recipe_small", "both_tail_c3", "onpolicy_zero"])
def test_golden(name, backend):
    arrays, settings, expected = load(name)
    lengths = torch.from_numpy(arrays["lens"]).long()
    inside = torch.arange(arrays["logp"].shape[1])[None] < lengths[:, None]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    logp = torch.from_numpy(arrays["logp"])[inside].requires_grad_()
    out = fipo_loss(
        logp,
        torch.from_numpy(arrays["old"])[inside],
        torch.from_numpy(arrays["adv"]),
        torch.ones(logp.shape, dtype=torch.bool),
        cu_seqlens,
        config_of(settings),
        backend=backend,
    )
    out.loss.backward()

    assert out.loss.item() == pytest.approx(expected["pg_loss"], rel=1e-5)
    grad = torch.from_numpy(arrays["grad"])[inside]
    assert (logp.grad - grad).abs().max() <= 2e-5 * grad.abs().max()
    assert len([key for key in out.metrics if key.startswith("actor/")]) == len(expected) == 28
    for key, value in expected.items():
        assert out.metrics[f"actor/{RENAMED.get(key, key)}"] == pytest.approx(value, rel=1e-4, abs=1e-9), key


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("name", ["recipe_small", "both_tail_c3"])
def test_golden_left_padded_by_a_prompt(name, backend):
    """The same batch as packed prompt + response sequences with a hostile padding: nothing changes."""
    arrays, settings, expected = load(name)
    rows, old_rows, adv = (torch.from_numpy(arrays[key]) for key in ("logp", "old", "adv"))
    lengths = torch.from_numpy(arrays["lens"]).long()
    logp, old, mask, total = [], [], [], [0]
    for row, old_row, length in zip(rows, old_rows, lengths.tolist(), strict=True):
        prompt = torch.full((5,), float("nan"))
        logp += [prompt, row[:length], prompt[:2]]
        old += [prompt, old_row[:length], -prompt[:2]]
        mask += [torch.zeros(5), torch.ones(length), torch.zeros(2)]
        total.append(total[-1] + length + 7)
    out = fipo_loss(
        torch.cat(logp),
        torch.cat(old),
        adv,
        torch.cat(mask).bool(),
        torch.tensor(total),
        config_of(settings),
        backend=backend,
    )
    assert out.loss.item() == pytest.approx(expected["pg_loss"], rel=1e-5)
    for key, value in expected.items():
        assert out.metrics[f"actor/{RENAMED.get(key, key)}"] == pytest.approx(value, rel=1e-4, abs=1e-9), key
