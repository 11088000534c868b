"""The HTML report: right numbers, well-formed charts, nothing fetched, damaged runs."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from observe_runs import make_run, step_metrics, weighted_samples
from PIL import Image

from megatron_fipo.observe import svg
from megatron_fipo.observe.statistics import wilson_interval
from megatron_fipo.report import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        make_run(folder, f"seed-{seed}", seed=seed)
    return folder


@pytest.fixture(scope="module")
def page(runs) -> str:
    assert main([str(runs / "seed-1"), "--json", str(runs / "headline.json")]) == 0
    return (runs / "seed-1" / "report.html").read_text()


def figures(page: str) -> dict[str, ElementTree.Element]:
    """Title -> SVG of every chart, parsed as XML."""
    found = re.findall(r"<figure><figcaption><b>(.*?)</b>.*?(<svg.*?</svg>)</figure>", page, flags=re.S)
    assert len(found) == page.count("<svg") > 0
    return {title: ElementTree.fromstring(chart) for title, chart in found}


def tooltips(chart: ElementTree.Element) -> list[str]:
    return [title.text or "" for title in chart.iter("title")]


def test_headline_numbers(page, runs):
    text = re.sub(r"<[^>]*>", "", page)
    assert "23.4 → 55.8 %" in text
    assert "95 % CI 20.9–26.1 → 52.7–58.8, n = 1,024" in text
    (top,) = json.loads((runs / "headline.json").read_text())["runs"]
    assert top["accuracy_before"] == {
        "value": 0.234375,
        "low": pytest.approx(0.2094, abs=1e-4),
        "high": pytest.approx(0.2613, abs=1e-4),
        "n": 1024,
    }
    assert (top["steps"], top["train_seconds"], top["damaged_lines"]) == (20, 132.4, 0)


def test_charts_show_the_metrics(page):
    charts = figures(page)
    wanted = "Accuracy,Reward,Response length,Entropy,Policy KL,Active fraction,Clipped tokens,Gradient norm"
    wanted += ",Engine against trainer,Operations,Memory,Step time by phase,Throughput"
    assert set(wanted.split(",")) <= set(charts)
    training = svg.format_value(step_metrics(20)["reward/accuracy"], "%")
    last = f"step 20\ntraining samples: {training}\nheld-out, sampled: 55.76 %\nheld-out, greedy: 74 %"
    assert tooltips(charts["Accuracy"])[-1] == last
    by_update = tooltips(charts["Active fraction within a step"])
    assert by_update[0] == "update 1\nactive fraction: 0 %" and len(by_update) == 4
    phases = tooltips(charts["Step time by phase"])[0]
    assert re.findall(r"^(\w+): ", phases, flags=re.M) == ["rollout", "old_logp", "update", "other"]


def test_points_lie_inside_the_plot(page):
    for title, chart in figures(page).items():
        for path in chart.iter("path"):
            if path.get("class") == "bar":
                continue
            numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", path.get("d"))]
            assert all(svg.LEFT - 1 <= x <= svg.WIDTH for x in numbers[::2]), title
            assert all(0 <= y <= svg.HEIGHT - svg.BOTTOM + 0.1 for y in numbers[1::2]), title


def test_nothing_is_fetched_or_run(page):
    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "img", "iframe", "object", "embed")
            assert not {"src", "href"} & {name for name, _ in attributes}

    Tags().feed(page)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|url\(|@import", page)


def test_answers_are_text_not_markup(page):
    assert "9-4=5;5&lt;2=7#7$" in page and "5<2" not in page
    answers = page.split("<h2>Sampled answers</h2>")[1].split("<h2>")[0]
    assert answers.count('class="right"') == 2 and answers.count('class="wrong"') == 2


def test_tokens_are_coloured_by_their_weights(page):
    (section,) = re.findall(r"<h2>Influence weights, token by token</h2>.*?(?=<h2>)", page, flags=re.S)
    assert "Of the last update of step 20" in section and section.count('class="response"') == 2
    right, _ = section.split('class="response"')[1:]
    spans = re.findall(r'<span class="(\w*)" title="f = ([\d.]+)">(.*?)</span>', right, flags=re.S)
    assert [(text, f) for _, f, text in spans] == [
        (" 7", "1.2"), ("+1", "1.1"), ("=", "1"), ("8", "0.9"), ("&lt;b&gt;", "0.8"), ("\n", "1"), ("end", "1"),
    ]  # fmt: skip
    assert [level for level, *_ in spans] == ["up7", "up3", "", "down4", "down8", "", ""]  # 8 = ln 0.8, the furthest
    assert '<i title="not written by the policy">tool: 8</i>' in right
    assert "1,234 more" in section and "1,234 more" not in right
    assert ".down8 {" in page and "prefers-color-scheme: dark" in page


def test_the_overview_comes_first(page):
    labels = re.findall(r'<div class="label">(.*?)</div>', page.split("<h2>")[0])
    assert labels[:4] == ["Accuracy on held-out, sampled", "Accuracy on held-out, greedy", "Reward", "Response length"]
    assert {"Active fraction", "Policy KL", "Engine against trainer", "Memory"} < set(labels) and len(labels) <= 15


def test_alarms_stand_at_the_head(tmp_path):
    folder = make_run(tmp_path, "drifted", steps=4, finished=False)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for row in rows[-2:]:
        row["alarms"] = {"drift": "engine & trainer disagree"}
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = make_run(tmp_path, "calm", steps=4)
    both = tmp_path / "both.html"
    for arguments in ([folder.path], [other.path], [folder.path, other.path, "--out", both]):
        assert main([*map(str, arguments)]) == 0
    alarm = "<div>step 3: engine &amp; trainer disagree</div>"
    for page in (folder.report.read_text(), both.read_text()):
        assert page.split("<h2>")[0].count(alarm) == page.count("disagree") == 1
    assert "alarms</b>" not in other.report.read_text()


def test_long_runs_stay_below_a_megabyte(tmp_path):
    folders = [str(make_run(tmp_path, f"run{i}", steps=steps).path) for i, steps in enumerate((1500, 400, 400, 400))]
    with (tmp_path / "run0" / "samples.jsonl").open("a") as file:
        for sample in weighted_samples(1500):
            file.write(json.dumps(sample | {"pieces": [" token"] * 1500, "influence": [1.1234] * 1500}) + "\n")
    assert main([folders[0]]) == 0
    assert main([*folders, "--out", str(tmp_path / "all.html")]) == 0
    assert (tmp_path / "run0" / "report.html").stat().st_size < 1e6
    assert (tmp_path / "all.html").stat().st_size < 1e6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(scheme, runs, page, tmp_path):
    """Headless Chromium: no message on its console, and a picture that is not one colour."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    picture = tmp_path / "page.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1250,4000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", f"--screenshot={picture}"]
    command += [f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"]
    process = subprocess.run(
        [*command, f"file://{runs / 'seed-1' / 'report.html'}"], capture_output=True, text=True, timeout=120
    )
    assert picture.exists(), process.stderr[-2000:]
    assert not [line for line in process.stderr.splitlines() if "CONSOLE" in line]
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert (pixels[0, 0] > 200) == (scheme == "light")  # the page's own background
    assert ((pixels.astype(int) - pixels[0, 0].astype(int)).__abs__() > 60).mean() > 0.01


def test_comparison_lays_runs_over_each_other(runs):
    out = runs / "all.html"
    assert main([str(runs / "seed-1"), str(runs / "seed-2"), "--out", str(out)]) == 0
    page = out.read_text()
    for title, chart in figures(page).items():
        texts = tooltips(chart)[-1]
        assert "seed-1: " in texts and "seed-2: " in texts, title
    assert re.search(r'<td class="name">seed</td><td><code>1</code></td><td><code>2</code>', page)
    assert '<td class="name">lr</td>' not in page  # equal in both runs


def test_a_run_killed_while_it_wrote(tmp_path):
    folder = make_run(tmp_path, "killed", steps=7, finished=False)
    text = folder.metrics.read_text()
    folder.metrics.write_text(text[: len(text) - 300])
    assert main([str(folder.path)]) == 0
    page = folder.report.read_text()
    assert "1 damaged line in its files left out" in page
    assert "not finished" in page
    assert "step 6\n" in page and "step 7\n" not in page


def test_only_the_evaluation_before_training(tmp_path):
    folder = make_run(tmp_path, "young", steps=0, finished=False)
    assert main([str(folder.path)]) == 0
    assert list(figures(folder.report.read_text())) == ["Accuracy"]


def test_missing_keys_and_values_that_are_not_finite(tmp_path):
    folder = tmp_path / "sparse"
    folder.mkdir()
    rows = [{"step": 1, "actor/entropy": 0.5}, {"step": 2, "actor/entropy": None}, {"step": 3, "actor/entropy": 0.4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    charts = figures(page)
    assert list(charts) == ["Entropy"]
    assert len([p for p in charts["Entropy"].iter("path") if p.get("class") == "line"]) == 2  # a gap at step 2
    assert "1 value was not finite" in page


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "x'])
def test_a_folder_without_a_step_is_a_clear_mistake(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and error.count("\n") == 1


def test_no_such_run_and_no_out(tmp_path, capsys, runs):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([str(runs / "seed-1"), str(runs / "seed-2")]) == 2
    assert "--out" in capsys.readouterr().err


def test_wilson_interval_against_its_defining_equation():
    """The bounds are the p at which the observed fraction is 1.96 standard errors away."""
    for accuracy, n in ((0.0, 10), (0.234375, 1024), (0.5, 4), (1.0, 1024)):
        for p in wilson_interval(accuracy, n):
            assert (accuracy - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, abs=1e-15)


finite = st.one_of(st.floats(-1e30, 1e30, allow_nan=False), st.floats(-1e-13, 1e-13), st.floats(0.0, 1.0))


@given(
    st.lists(st.one_of(st.none(), finite), min_size=1, max_size=40).filter(lambda ys: any(y is not None for y in ys))
)
def test_any_curve_gives_valid_svg(ys):
    chart = svg.Chart('<&"', lines=[svg.Line("a<b", range(len(ys)), ys)])
    drawn = ElementTree.fromstring(svg.draw(chart))
    heights = [float(y) for p in drawn.iter("path") for y in re.findall(r" (-?\d+\.\d+)", p.get("d"))]
    assert all(svg.TOP - 0.1 <= y <= svg.HEIGHT - svg.BOTTOM + 0.1 for y in heights)
    assert len(tooltips(drawn)) == len(ys)


@given(finite, finite)
def test_ticks_enclose_the_values(a, b):
    low, high = min(a, b), max(a, b)
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
        ticks = svg.nice_ticks(low, high, 4)
        slack = 1e-6 * (high - low)
        assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= 8


def test_a_spike_survives_thinning():
    ys = [0.0] * 5000
    ys[3210] = 1.0
    path = svg.draw(svg.Chart("a", lines=[svg.Line("a", range(5000), ys)])).split('class="line"')[1].split("/>")[0]
    assert f" {svg.TOP:.1f}" in path
    assert path.count("L") < 1300
