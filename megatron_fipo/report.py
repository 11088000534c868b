"""One self-contained HTML page from the files of a run, or of several runs laid over each other.

    python -m megatron_fipo.report runs/NAME                       # writes runs/NAME/report.html
    python -m megatron_fipo.report runs/A runs/B --out compare.html

Works on a run that is still going or was killed: it shows what the files hold and says what was damaged.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.errors import UserError
from megatron_fipo.observe.page import render_page
from megatron_fipo.observe.run_data import RunData, headline, load_run
from megatron_fipo.observe.run_folder import write_json, write_text


def write_report(runs: Sequence[RunData], out: Path) -> Path:
    """Write the page of `runs` to `out` and return it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render_page(runs))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, e.g. runs/quickstart")
    parser.add_argument("--out", type=Path, help="HTML file to write (default: RUN/report.html for a single run)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the headline numbers to FILE")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out is None and len(arguments.runs) > 1:
            raise UserError(
                f"--out is missing for {len(arguments.runs)} runs: say where to write, e.g. --out all.html."
            )
        runs = [load_run(path) for path in arguments.runs]
        out = write_report(runs, arguments.out or arguments.runs[0] / "report.html")
        if arguments.json:
            write_json(arguments.json, {"runs": [headline(run) for run in runs]})
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
