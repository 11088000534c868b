#!/usr/bin/env python
"""What moved between two benchmark results beyond noise.

    python tools/bench_compare.py A.json B.json

A row has moved if its median time differs by more than 5 % and the quartiles of the two runs do not overlap. Results
from different machines are compared all the same, with a warning.
"""

import argparse
import json
from pathlib import Path


def moved(a: dict, b: dict) -> bool:
    apart = a["quartiles"][1] < b["quartiles"][0] or b["quartiles"][1] < a["quartiles"][0]
    return apart and abs(b["milliseconds"] / a["milliseconds"] - 1) > 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs=2, type=Path, metavar="JSON")
    before, after = (json.loads(path.read_text()) for path in parser.parse_args().results)
    for key in ("cpu", "cores", "threads", "cpu_capability"):
        values = [result["environment"].get(key) for result in (before, after)]
        if values[0] != values[1]:
            print(f"warning: {key} differs: {values[0]} and {values[1]}")

    print("ratios")
    for key in before["ratios"].keys() | after["ratios"].keys():
        a, b = before["ratios"].get(key), after["ratios"].get(key)
        change = f"{b / a - 1:+8.1%}" if a and b else "only in one"
        print(f"  {key:28}{a or float('nan'):12.4g}{b or float('nan'):12.4g}  {change}")

    rows = {(row["case"], row["name"]): row for row in before["rows"]}
    pairs = [(rows[key], row) for row in after["rows"] if (key := (row["case"], row["name"])) in rows]
    changed = [(a, b) for a, b in pairs if moved(a, b)]
    print(f"\n{len(changed)} of {len(pairs)} timings moved beyond noise")
    for a, b in changed:
        change = b["milliseconds"] / a["milliseconds"] - 1
        print(f"  {a['case']:34}{a['name']:34}{a['milliseconds']:10.4f} -> {b['milliseconds']:10.4f} ms {change:+8.1%}")


if __name__ == "__main__":
    main()
