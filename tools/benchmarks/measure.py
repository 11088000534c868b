"""Times calls side by side in one process and writes what came out.

Every round takes each call once, in turn, so that whatever disturbs the machine disturbs all of them; ratios are
medians over the rounds of (time of the peer / time of ours). Before a call is timed it runs unmeasured for a moment:
the thread pools of torch and numba spin for a while after each use, and would take the cores away from each other.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

WARM_UP_SECONDS = 0.004
SAMPLE_SECONDS = 0.004  # short calls are repeated until a sample is that long


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The flags that benchmarks of operators share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few samples only, to see that it runs")
    return parser.parse_args()


def interleave(calls: Mapping[str, Callable[[], object]], *, seconds: float, rounds: int = 7) -> dict[str, list[float]]:
    """Seconds per call, one sample for each round: at least `rounds` of them, then more until `seconds` have passed."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(next(iter(samples.values()))) < rounds or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            warm_until = time.perf_counter() + WARM_UP_SECONDS
            while time.perf_counter() < warm_until:
                call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return samples


def ratio(samples: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over the rounds of time(numerator) / time(denominator)."""
    return statistics.median(a / b for a, b in zip(samples[numerator], samples[denominator], strict=True))


def rows(case: str, samples: Mapping[str, list[float]], *, ours: str, tokens: int, bytes_per_token: int) -> list[dict]:
    """One row for each call: median time with its quartiles, bandwidth, and its time over ours."""
    result = []
    for name, seconds in samples.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        result.append(
            {
                "case": case,
                "name": name,
                "milliseconds": median * 1e3,
                "quartiles": [low * 1e3, high * 1e3],
                "samples": len(seconds),
                "gigabytes_per_second": bytes_per_token * tokens / median / 1e9,
                "nanoseconds_per_token": median / tokens * 1e9,
                "over_ours": ratio(samples, name, ours),
            }
        )
    return result


def print_table(title: str, table: list[dict]) -> None:
    print(f"\n{title}")
    print(f"  {'':34}{'ms':>12}{'quartiles':>22}{'GB/s':>9}{'ns/token':>10}{'/ ours':>10}")
    for row in table:
        low, high = row["quartiles"]
        print(
            f"  {row['name']:34}{row['milliseconds']:12.4f}{f'{low:.4f} .. {high:.4f}':>22}"
            f"{row['gigabytes_per_second']:9.1f}{row['nanoseconds_per_token']:10.3f}{row['over_ours']:10.3g}"
        )


def write_report(path: Path | None, ratios: dict[str, float], table: list[dict], environment: dict) -> None:
    """Prints the ratios; with a path also writes {"ratios", "rows", "environment"} as JSON."""
    print("\nratios")
    for key, value in ratios.items():
        print(f"  {key:28}{value:12.4g}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"ratios": ratios, "rows": table, "environment": environment}, indent=1) + "\n")
        print(f"written to {path}")
