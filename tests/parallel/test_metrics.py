"""Every metric of a step against a direct float64 computation on the whole batch, in several layouts and packings."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_cases import LAYOUTS, expected_metrics, influence, kept_responses, make_samples, rank_main

QUANTILES = ("_is_p", "_is_median", "mismatch/median", "mismatch/p")  # from histograms


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """By rank, what it reports for each layout."""
    folder = tmp_path_factory.mktemp("metrics")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def pack_positions(reports: list[dict], name: str) -> list[list[int]]:
    """Positions of every pack of every update, from the tensors that the ranks hold."""
    layout, ranks = LAYOUTS[name], [report[name]["positions"] for report in reports]
    if layout.data == 2:  # each rank has packs of its own
        return [a + b for a, b in zip(*ranks, strict=True)]
    return [[layout.context * n for n in update] for update in ranks[0]]


def check(found: dict, expected: dict, where: str) -> None:
    assert found.keys() == expected.keys(), where
    for key, value in expected.items():
        if key == "updates":
            continue
        # half a bin of the histogram is 0.13 % of log r, which is below 3.3 at these quantiles
        tolerance = 5e-3 if any(part in key for part in QUANTILES) else 2e-6
        assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-7), (where, key)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_metric_is_that_of_the_whole_batch(name, reports):
    positions = pack_positions(reports, name)
    expected = expected_metrics(LAYOUTS[name], positions)
    for rank, report in enumerate(reports):
        found = report[name]["metrics"]
        check(found, expected, f"rank {rank}")
        for update, (part, whole) in enumerate(zip(found["updates"], expected["updates"], strict=True)):
            check(part, whole, f"rank {rank}, update {update}")


def test_the_data_reach_every_number(reports):
    """No metric is right because it is zero; packings differ where they should."""
    metrics = reports[0]["DP1 CP2 several micro-batches"]["metrics"]
    assert not [key for key, value in metrics.items() if value == 0]
    counts = {name: [len(update) for update in report["positions"]] for name, report in reports[0].items()}
    assert counts["DP1 CP1 one micro-batch"] == [1, 1, 1]
    assert min(counts["DP1 CP1 several micro-batches"]) >= 4
    first, *later = metrics["updates"]
    assert first["fipo/active_fraction"] == 0 and all(update["fipo/active_fraction"] > 0.5 for update in later)
    assert all(report[name]["memory"] > 2**27 for report in reports for name in LAYOUTS)


def test_the_page_names_every_metric(reports):
    """In full, or by the end that differs from the name before it."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = [name.lstrip(".") for name in re.findall(r"`([^`]+)`", page) if len(name) > 3]
    keys = set(reports[0]["DP2 CP1 one micro-batch"]["metrics"]) - {"updates"}
    assert not [key for key in keys if not any(key.endswith(name) for name in names)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_weights_of_single_samples(name, reports):
    """Of the last update, the sample with the highest and the one with the lowest reward, token by token."""
    groups = make_samples()
    responses = kept_responses(groups)
    samples = [sample for g in (0, 1, 3, 4, 6, 7) for sample in groups[g]]
    last = [response.number for response in responses if response.update == 2]
    chosen = [max(last, key=lambda i: samples[i].reward), min(last, key=lambda i: samples[i].reward)]
    for report in reports:
        assert [number for number, *_ in report[name]["samples"]] == chosen
        assert len({w for *_, mask, weight in report[name]["samples"] for w in weight[mask]}) > 2
        for number, tokens, mask, weight in report[name]["samples"]:
            np.testing.assert_array_equal(tokens, samples[number].tokens)
            np.testing.assert_array_equal(mask, samples[number].response_mask)
            f, _ = influence(responses[number])
            np.testing.assert_allclose(weight[mask], f[responses[number].mask], rtol=2e-6)
