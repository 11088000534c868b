"""Builds the report's HTML from run data: headline, charts, answers, settings. One string, nothing to fetch."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_fipo.observe import svg, token_page
from megatron_fipo.observe.alarms import onsets
from megatron_fipo.observe.curves import COLORS, charts
from megatron_fipo.observe.overview import overview
from megatron_fipo.observe.page_style import CSS
from megatron_fipo.observe.run_data import RunData, headline

MAX_PROMPTS = 8  # sampled prompts shown
# Arguments shown first; the rest of Megatron's some 800 is folded away.
MAIN_ARGUMENT_PREFIXES = ("fipo_", "grpo_", "rollout_", "reward_", "loss", "eval_", "prompt_", "hf_", "sglang_")
MAIN_ARGUMENTS = (
    "preset",
    "seed",
    "num_steps",
    "global_batch_size",
    "micro_batch_size",
    "max_tokens_per_microbatch",
    "max_prompt_tokens",
    "lr",
    "min_lr",
    "lr_decay_style",
    "weight_decay",
    "clip_grad",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "bf16",
    "fp8",
    "transformer_impl",
    "use_distributed_optimizer",
    "load",
    "save_interval",
    "run_name",
)


def render_page(runs: Sequence[RunData]) -> str:
    """The whole page for one run, or a comparison for several."""
    title = runs[0].name if len(runs) == 1 else "Comparison of runs"
    body = [
        f"<h1>{escape(title)}</h1>",
        _subtitle(runs),
        *(_warning(run) for run in runs),
        *(_alarms(run) for run in runs),
    ]
    body.append(_tiles(runs[0]) if len(runs) == 1 else _comparison(runs))
    body.append(f'<h2>Curves</h2><div class="charts">{"".join(_figure(chart) for chart in charts(runs))}</div>')
    if len(runs) == 1:
        body += [_answers(runs[0]), token_page.token_weights(runs[0])]
        body += [_arguments(runs[0].arguments), _environment(runs[0].environment)]
    else:
        body.append(_argument_differences(runs))
    # The policy makes the browser itself enforce that the page fetches nothing and runs nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - FIPO report</title><style>{CSS}{token_page.CSS}</style></head><body>"
        f"{''.join(body)}</body></html>\n"
    )


def _subtitle(runs: Sequence[RunData]) -> str:
    if len(runs) > 1:
        return f'<div class="soft">FIPO training, {len(runs)} runs</div>'
    run, top = runs[0], headline(runs[0])
    parts = ["FIPO training", str(top["status"])]
    if run.arguments.get("hf_model"):
        parts.append(Path(run.arguments["hf_model"]).name)
    if top["seed"] is not None:
        parts.append(f"seed {top['seed']}")
    if run.environment.get("gpus"):
        parts.append(f"{len(run.environment['gpus'])} x {run.environment['gpus'][0]}")
    elif run.environment.get("cpu"):
        parts.append(str(run.environment["cpu"]))
    return f'<div class="soft">{escape(" · ".join(parts))}</div>'


def _warning(run: RunData) -> str:
    parts = []
    if run.damaged_lines:
        lines = "line" if run.damaged_lines == 1 else "lines"
        parts.append(f"{run.damaged_lines} damaged {lines} in its files left out")
    holes = sum(value is None for row in run.rows for value in row.values())
    if holes:
        values = "value was" if holes == 1 else "values were"
        parts.append(f"{holes} {values} not finite (gaps in the curves)")
    return f'<div class="warning note">{escape(run.name)}: {"; ".join(parts)}.</div>' if parts else ""


def _alarms(run: RunData) -> str:
    lines = "".join(f"<div>step {alarm['step']}: {escape(alarm['text'])}</div>" for alarm in onsets(run.rows))
    return f'<div class="warning"><b>{escape(run.name)}: alarms</b>{lines}</div>' if lines else ""


def _tiles(run: RunData) -> str:
    top, tiles = headline(run), []
    for label, kind in (("sampled", "accuracy"), ("greedy", "greedy")):
        before, after = top[f"{kind}_before"], top[f"{kind}_after"]
        if before is None:
            continue
        where = f"Accuracy on {top['evaluation']}, {label}"
        if after is None:
            tiles.append((where, _percent(before["value"]), f"95 % CI {_interval(before)}, n = {before['n']:,}"))
        else:
            value = f"{100 * before['value']:.1f} → {_percent(after['value'])}"
            note = f"95 % CI {_interval(before)} → {_interval(after)}, n = {after['n']:,}"
            tiles.append((where, value, note))
    tiles += [(label[0].upper() + label[1:], value, note) for label, value, note in overview(run)]
    tiles.append(("Steps", f"{top['steps']:,}", f"in {_duration(top['train_seconds'])}"))
    cells = (
        f'<div class="tile"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value).replace("→", "<i>→</i>")}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for label, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _comparison(runs: Sequence[RunData]) -> str:
    titles = ["accuracy before", "after", "greedy before", "after", "length", "active", "tokens/s"]
    titles += ["steps", "time", "seed", "alarms"]
    head = "<th>run</th>" + "".join(f'<th class="number">{title}</th>' for title in titles)
    rows = []
    for i, run in enumerate(runs):
        top = headline(run)
        accuracies = (top[key] for key in ("accuracy_before", "accuracy_after", "greedy_before", "greedy_after"))
        cells = [_accuracy_cell(accuracy) for accuracy in accuracies]
        lengths = run.values("response/length_mean")
        cells.append(svg.format_value(lengths[-1]) if lengths else "")
        active, rate = top["active_fraction_mean"], top["response_tokens_per_second"]
        cells.append("" if active is None else _percent(active))
        cells.append("" if rate is None else svg.format_value(rate))
        cells += [f"{top['steps']:,}", _duration(top["train_seconds"]), "" if top["seed"] is None else f"{top['seed']}"]
        cells.append(", ".join(dict.fromkeys(alarm["kind"] for alarm in onsets(run.rows))))
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{_key(i % COLORS)}{escape(run.name)}</td>{numbers}</tr>")
    note = '<p class="note">Accuracies with their 95 % intervals; the length is the last step&#39;s mean.</p>'
    return f'<div class="scroll comparison"><table><tr>{head}</tr>{"".join(rows)}</table></div>{note}'


def _accuracy_cell(accuracy: Mapping[str, float] | None) -> str:
    if accuracy is None:
        return ""
    return f'{_percent(accuracy["value"])}<br><span class="note">{_interval(accuracy)}</span>'


def _figure(chart: svg.Chart) -> str:
    keys = [(line.name, _key(line.color)) for line in chart.lines]
    keys += [(band.name, _key(band.color, "area" if band.stacked else "area range")) for band in chart.bands]
    legend = "".join(f"<span>{key}{escape(name)}</span>" for name, key in keys) if len(keys) > 1 else ""
    note = f'<span class="note">{escape(chart.note)}</span>'
    # The line under the title is the legend, or the note where one curve needs no legend: plots of a row stay aligned.
    title = f"<b>{escape(chart.title)}</b>" + (f" {note}" if legend else "")
    caption = f'<figcaption>{title}<div class="legend">{legend or note}</div></figcaption>'
    return f"<figure>{caption}{svg.draw(chart)}</figure>"


def _key(color: int, kind: str = "") -> str:
    return f'<span class="key {kind}" style="background:var(--c{color})"></span>'


def _answers(run: RunData) -> str:
    """Sampled answers by prompt, before and after training side by side."""
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    for sample in run.samples:
        if sample.get("when") in ("before", "after"):
            by_prompt.setdefault(sample["prompt"], {})[sample["when"]] = sample  # a run that went on has two "after"
    if not by_prompt:
        return ""
    rows = []
    for prompt, pair in list(by_prompt.items())[:MAX_PROMPTS]:
        answer = next(iter(pair.values()))["answer"]
        cells = "".join(f"<td>{_answer(pair.get(when))}</td>" for when in ("before", "after"))
        rows.append(
            f"<tr><td><code>{escape(prompt)}</code></td><td><code>{escape(str(answer))}</code></td>{cells}</tr>"
        )
    head = "<tr><th>prompt</th><th>answer</th><th>before training</th><th>after training</th></tr>"
    return f'<h2>Sampled answers</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _answer(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return ""
    verdict = "right" if sample["correct"] else "wrong"
    return f'<code>{escape(str(sample["response"]))}</code> <span class="{verdict}">{verdict}</span>'


def _arguments(arguments: Mapping[str, Any]) -> str:
    if not arguments:
        return ""
    main = {key for key in arguments if key.startswith(MAIN_ARGUMENT_PREFIXES) or key in MAIN_ARGUMENTS}
    rest = {key: value for key, value in arguments.items() if key not in main}
    shown = {key: value for key, value in arguments.items() if key in main and value is not None}
    folded = f"<details><summary>{len(rest)} more</summary>{_table(rest)}</details>" if rest else ""
    return f"<h2>Arguments</h2>{_table(shown)}{folded}"


def _argument_differences(runs: Sequence[RunData]) -> str:
    names = sorted({name for run in runs for name in run.arguments})
    texts = {name: [_text(run.arguments.get(name)) for run in runs] for name in names}
    rows = [
        f'<tr><td class="name">{escape(name)}</td>{"".join(f"<td><code>{escape(v)}</code></td>" for v in values)}</tr>'
        for name, values in texts.items()
        if len(set(values)) > 1
    ]
    if not rows:
        return ""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    table = f"<table><tr><th>argument</th>{head}</tr>{''.join(rows)}</table>"
    return f'<h2>Arguments that differ</h2><div class="scroll">{table}</div>'


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return ""
    flat: dict[str, Any] = {}
    for key, value in environment.items():
        flat |= {f"{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {key: value}
    return f"<h2>Environment</h2>{_table({key: value for key, value in flat.items() if value not in (None, [])})}"


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f'<tr><td class="name">{escape(str(key))}</td><td><code>{escape(_text(values[key]))}</code></td></tr>'
        for key in sorted(values)
    )
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _interval(accuracy: Mapping[str, float]) -> str:
    return f"{100 * accuracy['low']:.1f}–{100 * accuracy['high']:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
