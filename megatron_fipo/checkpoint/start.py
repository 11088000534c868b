"""Where a command starts: from the model, from a checkpoint that it was given, or where its run was interrupted.

The same command started again continues its run, as a requeued job must; anything else that meets the folder of a run
has to say what it means. No run is started over while there is a checkpoint of it, whole or not.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_fipo.checkpoint.state import check_loadable, saved_steps
from megatron_fipo.errors import SharedUserError, UserError
from megatron_fipo.observe.run_folder import RunFolder, read_jsonl


@dataclass(frozen=True)
class Start:
    """``load``: the folder of checkpoints to load, ``weights_only`` as with --finetune; ``note``: to tell the user."""

    load: str | None
    weights_only: bool
    note: str | None = None


def check_same_start(runs_dir: str, load: str | None) -> None:
    """Every rank has looked into ``runs_dir`` by itself; collective. Raises UserError if they saw different runs."""
    starts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(starts, load)
    if len(set(starts)) > 1:
        missing = [rank for rank, start in enumerate(starts) if start is None]
        raise SharedUserError(
            f"--runs-dir {runs_dir} is not the same folder on all nodes: ranks {missing} find no run to continue, the "
            f"others do; give a folder on a file system that all nodes share"
        )


def find_start(run: RunFolder, load: str | None, *, finetune: bool, command_line: Sequence[str], saves: bool) -> Start:
    """Decide from what the run's folder holds; nothing is changed.

    Args:
        load, finetune: --load and --finetune.
        command_line: the words of this command.
        saves: the run writes checkpoints as it goes.

    Raises:
        UserError: nothing to load, or the folder holds another run, a finished one, or one that would be started over.
    """
    if not run.metrics.exists() and not run.checkpoints.exists():
        if load:
            check_loadable(load, finetune=finetune)
        return Start(load, finetune)

    given = load is not None and not finetune and Path(load).resolve() == run.checkpoints.resolve()
    if not given and not _is_same(_recorded(run.arguments).get("command_line"), command_line):
        raise UserError(
            f"{run.path} already holds a run, started by another command; continue it with --load {run.checkpoints}, "
            f"choose another --run-name, or remove the folder"
        )
    summary = _recorded(run.summary)
    if not given and summary.get("status") == "finished":
        raise UserError(
            f"{run.path} already holds a run, finished after {summary.get('steps')} steps; to continue it add --load "
            f"{run.checkpoints} and raise --num-steps, or choose another --run-name"
        )
    steps = saved_steps(run.checkpoints)
    if steps or given:
        check_loadable(str(run.checkpoints), finetune=False)
        note = f"continuing {run.path}" + (f" rather than --load {load}" if load and not given else "")
        return Start(str(run.checkpoints), False, None if given else note)
    if not saves:
        raise UserError(
            f"{run.path} already holds a run, interrupted and without checkpoints; remove the folder to start over, or "
            f"choose another --run-name (--save-interval makes runs that can be continued)"
        )
    if load:
        check_loadable(load, finetune=finetune)
    last = max((row["step"] for row in read_jsonl(run.metrics)[0]), default=0) if run.metrics.exists() else 0
    note = f"{run.path} was interrupted after step {last}, before its first checkpoint: starting over"
    return Start(load, finetune, note)


def _recorded(path: Path) -> dict:
    """A JSON file of the run; empty if it was not written, or is not readable."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_same(before: Sequence[str] | None, now: Sequence[str]) -> bool:
    """Whether two commands are alike, but for --load: a run's own checkpoints come before those it began with."""
    return before is not None and list(_without_load(before)) == list(_without_load(now))


def _without_load(words: Sequence[str]) -> Iterator[str]:
    previous = ""
    for word in words:
        if "--load" not in (word.partition("=")[0], previous):
            yield word
        previous = word
