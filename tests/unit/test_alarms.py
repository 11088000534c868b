"""Alarms on synthetic histories: those that must ring, at the right step, and those that must not."""

import json
import math
import random

import pytest

from megatron_fipo.observe.alarms import onsets, raised
from megatron_fipo.observe.run_folder import RunFolder
from megatron_fipo.observe.writers import MetricWriter


def history(steps: int, seed: int = 1, **changes) -> list[dict]:
    """A healthy run: lengths grow, everything else is noisy around its level. ``changes``: key (with _ for /) to a
    function of (step, healthy value)."""
    noise = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "actor/pg_clipfrac_lower": 1e-4 * noise.uniform(0.3, 3),
            "actor/ppo_kl": 4e-4 * noise.uniform(-1, 1),
            "actor/grad_norm": 0.2 * noise.uniform(0.6, 1.6),
            "response/length_mean": 800 + 20 * step + noise.uniform(-60, 60),
            "mismatch/rms": 0.004 * noise.uniform(0.8, 1.2),
            "fipo/noise_budget": 0.0375,
        }
        active = [0.0, *(0.3 * noise.uniform(0.5, 1.5) for _ in range(3))]
        for key, change in changes.items():
            if key != "active":
                name = key.replace("_", "/", 1)
                row[name] = change(step, row[name])
        active = changes["active"](step, active) if "active" in changes else active
        row["updates"] = [{"fipo/active_fraction": fraction} for fraction in active]
        rows.append(row)
    return rows


def first_rings(rows: list[dict]) -> dict[str, int]:
    """{kind: step of its first alarm}, looking at the run as it grows."""
    steps: dict[str, int] = {}
    for end in range(1, len(rows) + 1):
        for kind in raised(rows[:end]):
            steps.setdefault(kind, end)
    return steps


def from_step(start: int, value: float):
    return lambda step, usual: value if step >= start else usual


def once(at: int, value: float):
    return lambda step, usual: value if step == at else usual


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_silent(seed):
    assert first_rings(history(120, seed)) == {}


def collapse(low_clip: float = 0.02, start: int = 70) -> dict:
    """As in the paper's ablation: the low-clip fraction, two steps later KL and norm, four steps later the length."""
    return {
        "actor_pg_clipfrac_lower": from_step(start, low_clip),
        "actor_ppo_kl": from_step(start + 2, 0.3),
        "actor_grad_norm": from_step(start + 2, 6.0),
        "response_length_mean": lambda step, usual: usual * (0.3 if step >= start + 4 else 1),
    }


def test_the_collapse_of_the_paper():
    rows = history(80, **collapse())
    assert first_rings(rows) == {"collapse": 72}
    text = raised(rows[:74])["collapse"]
    assert "low-clip fraction rose" in text and "|KL| rose" in text
    assert "gradient norm rose" in text and "length fell from 1,949" in text and "\n" not in text


@pytest.mark.parametrize("follower", ["actor_ppo_kl", "actor_grad_norm", "response_length_mean"])
def test_one_number_that_follows_the_low_clip_fraction_is_enough(follower):
    changes = collapse()
    kept = {key: change for key, change in changes.items() if key in ("actor_pg_clipfrac_lower", follower)}
    assert first_rings(history(80, **kept)) == {"collapse": 74 if follower == "response_length_mean" else 72}


@pytest.mark.parametrize(
    "changes",
    [
        {"actor_pg_clipfrac_lower": from_step(70, 0.02)},  # nothing follows
        {key: change for key, change in collapse().items() if key != "actor_pg_clipfrac_lower"},  # nothing leads
        {"actor_pg_clipfrac_lower": once(70, 0.02), "actor_grad_norm": once(70, 6.0)},  # one bad batch
        collapse(low_clip=9e-4),  # rises, but means nothing yet
        {**collapse(), "actor_pg_clipfrac_lower": lambda step, usual: 0.002 + 1e-5 * step},  # high from the start
        {"actor_grad_norm": lambda step, usual: usual * 1.03**step},  # slow growth
        {"response_length_mean": lambda step, usual: 4000 * 0.99**step},  # slow decline
    ],
)
def test_no_collapse(changes):
    assert "collapse" not in first_rings(history(80, **changes))


def test_no_collapse_before_there_is_a_baseline():
    assert first_rings(history(9, **collapse(start=3))) == {}


def test_inactive():
    assert first_rings(history(9, active=lambda step, usual: [0.0, 0.0, 5e-4, 0.0])) == {"inactive": 3}
    switched_off = history(20, active=lambda step, usual: usual if step < 10 else [0.0] * 4)
    assert first_rings(switched_off) == {"inactive": 12}


@pytest.mark.parametrize(
    "active",
    [
        lambda step, usual: [0.0, 0.0, 0.0, 0.01],
        lambda step, usual: [0.0],  # one update per rollout, allowed by --allow-inactive-fipo
        lambda step, usual: [0.0] * 4 if step % 3 else usual,
    ],
)
def test_active_enough(active):
    assert first_rings(history(20, active=active)) == {}


def test_a_loss_without_influence_weights_is_not_inactive():
    rows = history(20, active=lambda step, usual: [0.0] * 4)
    for row in rows:
        del row["fipo/noise_budget"]
    assert first_rings(rows) == {}


def test_log_probs_that_are_not_reproducible():
    """From the second step: a single one may be an accident."""
    rows = history(9, active=lambda step, usual: [0.02, *usual[1:]])
    assert first_rings(rows) == {"unequal": 2}
    assert "first update" in raised(rows)["unequal"] and "2 % of the tokens" in raised(rows)["unequal"]
    assert first_rings(history(9, active=lambda step, usual: [0.02 * (step % 2), *usual[1:]])) == {}


def test_drift():
    beyond = first_rings(history(20, mismatch_rms=from_step(10, 0.05)))
    assert beyond == {"drift": 12}
    growing = history(20, mismatch_rms=from_step(15, 0.022))
    assert first_rings(growing) == {"drift": 17}
    assert "drift apart" in raised(growing)["drift"] and "0.022 per token" in raised(growing)["drift"]
    assert first_rings(history(9, mismatch_rms=lambda step, usual: 0.05)) == {"drift": 3}


@pytest.mark.parametrize(
    "rms",
    [
        lambda step, usual: 0.03,  # large from the start, below the budget
        lambda step, usual: 0.05 if step % 3 else usual,  # no three steps in a row
        lambda step, usual: 1e-6 if step < 15 else 1e-4,  # grows a hundredfold and is nothing
    ],
)
def test_no_drift(rms):
    assert first_rings(history(30, mismatch_rms=rms)) == {}


def test_values_that_are_not_finite_or_not_there_do_not_disturb():
    rows = history(40)
    for row in rows[::7]:
        row["actor/grad_norm"], row["actor/ppo_kl"], row["mismatch/rms"] = None, math.nan, None
        del row["response/length_mean"]
    assert first_rings([{"step": 0, "eval/x/accuracy": 0.5}, *rows]) == {}
    assert raised([]) == {} and raised([{"step": 0}]) == {}


def test_an_onset_is_reported_once():
    rows = [
        {"step": step, "alarms": {"drift": f"text {step}"}} if step in (3, 4, 5, 8) else {"step": step}
        for step in range(9)
    ]
    assert onsets(rows) == [
        {"step": 3, "kind": "drift", "text": "text 3"},
        {"step": 8, "kind": "drift", "text": "text 8"},
    ]


def test_a_resumed_run_rings_as_an_uninterrupted_one(tmp_path):
    """The history comes from metrics.jsonl; killed in the middle of the collapse, between spike and followers."""
    rows = history(74, **collapse())

    def train(name: str, stops: tuple[int, ...]) -> list[dict]:
        folder = RunFolder(tmp_path, name)
        for begin, end in zip((0, *stops), (*stops, len(rows)), strict=True):
            with MetricWriter(folder) as writer:
                for row in rows[begin:end]:
                    writer.write({**row, "alarms": raised([*writer.history, row])})
        return [json.loads(line) for line in folder.metrics.read_text().splitlines()]

    whole = train("whole", ())
    assert train("resumed", (40, 71)) == whole
    assert [(alarm["step"], alarm["kind"]) for alarm in onsets(whole)] == [(72, "collapse")]
