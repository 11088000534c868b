"""Training state on disk: Megatron's torch_dist checkpoint plus the small state of the RL loop.

A checkpoint is written as ``partial-*/iter_0000010/``: Megatron's files (weights, optimizer, schedule, RNG), the loop's
``rl_state.json`` and leftovers, and last a manifest. The whole folder is then renamed to ``iter_0000010/``, so that a
folder of that name was whole once; what has happened to it since, the manifest tells. See docs/checkpoints.md.
"""

import argparse
import contextlib
import io
import json
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import async_utils, checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo.checkpoint.integrity import (
    MANIFEST,
    FileRecord,
    find_damage,
    move_durably,
    record_files,
    write_durably,
    write_manifest,
)
from megatron_fipo.checkpoint.torch_dist import TRACKER
from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.leftovers import Leftovers

_STATE_FILE = "rl_state.json"
_PARTIAL = "partial"


@dataclass(frozen=True)
class LoopState:
    """Where the RL loop stands after ``step`` finished steps.

    ``prompt_cursor`` prompts were handed out by the stream with the fingerprint ``prompts``; ``contrast_rate`` is the
    last step's share of groups with contrast; ``leftovers`` are the groups that it generated and did not need.
    """

    step: int = 0
    prompt_cursor: int = 0
    contrast_rate: float = 1.0
    prompts: str = ""
    leftovers: Leftovers | None = None

    def numbers(self) -> dict[str, Any]:
        """Everything but the samples."""
        numbers = asdict(replace(self, leftovers=None))
        del numbers["leftovers"]
        return numbers


class Checkpoints:
    """The checkpoints of one run: saved, pruned, and loaded again. Methods are collective over all ranks."""

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        keep_last: int,
        warn: Callable[[str], None],
        replicas: Replicas,
    ) -> None:
        """Collective.

        Args:
            folder: where this run's checkpoints go.
            args: Megatron's global arguments, which its loader and its writer read.
            keep_last: whole checkpoints that stay.
            warn: is told of every damaged checkpoint.
            replicas: share out the leftovers.
        """
        self._replicas = replicas
        self._folder, self._args, self._keep_last, self._warn = folder, args, keep_last, warn
        # A name of its own: a writer that outlived its killed run must not write into this run's files.
        self._partial = folder / f"{_PARTIAL}-{_gather(secrets.token_hex(4))[0]}"
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._damaged: set[Path] = set()
        self._pending: LoopState | None = None  # its asynchronous save is under way
        self._records: Future[dict[str, FileRecord]] | None = None  # of the pending save, once it is written
        self._thread = ThreadPoolExecutor(1, "checksums")

    def are_in(self, folder: str) -> bool:
        """Whether ``folder`` is where this run's checkpoints go."""
        return self._folder.resolve() == Path(folder).resolve()

    def save(self, state: LoopState) -> None:
        """Write a checkpoint of ``state.step``; with ``--async-save`` only start to, see :meth:`poll`.

        Raises UserError if it cannot be written; the earlier checkpoints are then untouched.
        """
        self.finish()
        self._pending = state
        self._together(self._clean)
        save_to, self._args.save = self._args.save, str(self._partial)
        try:
            self._megatron(
                lambda: checkpointing.save_checkpoint(
                    state.step,
                    self._model,
                    self._optimizer,
                    self._scheduler,
                    num_floating_point_operations_so_far=0,
                )
            )
        finally:
            self._args.save = save_to
        if not self._args.async_save:
            self.finish()

    def poll(self) -> None:
        """Make an asynchronous save visible if all ranks have written it. Call it once a step.

        Raises UserError, naming the step of the save, if it failed.
        """
        self._advance(blocking=False)

    def finish(self) -> None:
        """Wait for the save that is under way, if any, and make it visible. Raises UserError if it failed."""
        self._advance(blocking=True)

    def load(self, folder: Path) -> LoopState:
        """Load the newest whole checkpoint in ``folder``. Raises UserError if none is whole."""
        step = self._newest_whole(folder)
        self._args.load, self._args.ckpt_step = str(folder), step
        checkpointing.load_checkpoint(self._model, self._optimizer, self._scheduler)
        path = _folder_of(folder, step)
        return LoopState(**json.loads((path / _STATE_FILE).read_text()), leftovers=Leftovers.read(path, self._replicas))

    def load_weights(self, folder: Path) -> None:
        """Load the weights alone (``args.finetune``), of a run's newest whole checkpoint or of any of Megatron's."""
        self._args.load = str(folder)
        if _has_manifests(folder):
            self._args.ckpt_step = self._newest_whole(folder)
        checkpointing.load_checkpoint(self._model, None, None)
        if self._optimizer is not None:  # an evaluation has none
            self._optimizer.reload_model_params()  # fp32 main copies, where there are any

    def _newest_whole(self, folder: Path) -> int:
        damages = []
        for step in reversed(_gather(saved_steps(folder))[0]):
            path = _folder_of(folder, step)
            found = _gather(find_damage(path, part=dist.get_rank(), parts=dist.get_world_size()))
            damage = next(filter(None, found), None)
            if damage is None:
                return step
            self._damaged.add(path.resolve())
            damages.append((step, damage))
            self._warn(f"{path} is damaged and left out: {damage}")
        raise _none_whole(folder, damages)

    def _advance(self, *, blocking: bool) -> None:
        state = self._pending
        if state is None:
            return
        folder = _folder_of(self._partial, state.step)
        if self._records is None:
            self._megatron(lambda: async_utils.maybe_finalize_async_save(blocking=blocking))
            if not async_utils.is_empty_async_queue():
                return
            self._together(lambda: write_durably(folder / _STATE_FILE, json.dumps(state.numbers())))
            self._records = self._thread.submit(self._complete, folder, state.leftovers)
        if not blocking and not all(_gather(self._records.done())):
            return
        tables = self._on_every_rank(self._records.result)
        records = {name: record for table in tables for name, record in table.items()}
        self._together(lambda: self._publish(folder, records))
        self._pending = self._records = None

    def _complete(self, folder: Path, leftovers: Leftovers | None) -> dict[str, FileRecord]:
        """Add this rank's leftovers to what Megatron has written, and describe all its files."""
        if leftovers is not None:
            leftovers.write(folder, self._replicas)
        return record_files(folder, dist.get_rank())

    def _publish(self, folder: Path, records: dict[str, FileRecord]) -> None:
        """Make a written checkpoint whole and visible, then drop those that it makes superfluous."""
        write_manifest(folder, records)
        target = self._folder / folder.name
        if target.exists():  # damaged: the run would have gone on from it otherwise
            self._damaged.discard(target.resolve())
            self._remove(target)
        move_durably(folder, target)
        step = _step_of(target)
        write_durably(self._folder / TRACKER, str(step))
        earlier = [_folder_of(self._folder, s) for s in saved_steps(self._folder) if s <= step]
        whole = [p for p in earlier if p.resolve() not in self._damaged and not find_damage(p, contents=False)]
        for path in set(earlier) - set(whole[-self._keep_last :]):
            self._remove(path)
        self._clean()

    def _remove(self, path: Path) -> None:
        """Take a folder out of sight first, so that a kill on the way leaves no half checkpoint under its name."""
        doomed = self._partial.with_name(f"{self._partial.name}.{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _clean(self) -> None:
        """Remove what interrupted saves have left."""
        for path in self._folder.glob(f"{_PARTIAL}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _megatron(self, action: Callable[[], None]) -> None:
        """Run a part of Megatron's saving, which fails on all ranks alike, but tells the first alone why."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells every save in four lines
                action()
        except (CheckpointException, OSError) as error:
            causes = error.failures.values() if isinstance(error, CheckpointException) else ()
            reasons = [str(cause) for cause, _ in causes] or [str(error)]
            self._fail(reasons[0])

    def _together(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the first rank; if it fails, fail on all."""
        self._on_every_rank(lambda: action() if dist.get_rank() == 0 else None)

    def _on_every_rank(self, action: Callable[[], Any]) -> list[Any]:
        """Each rank's result of ``action``, on all ranks; if it fails on one, fail on all."""
        result, problem = None, None
        try:
            result = action()
        except OSError as error:
            problem = f"{error.strerror}: {error.filename or self._folder}"
        outcomes = _gather((result, problem))
        if problems := [problem for _, problem in outcomes if problem]:
            self._fail(problems[0])
        return [result for result, _ in outcomes]

    def _fail(self, reason: str) -> None:
        """Give the disk space back and raise UserError."""
        assert self._pending
        step, self._pending, self._records = self._pending.step, None, None
        existing = next(folder for folder in (self._folder, *self._folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if dist.get_rank() == 0:
            self._clean()
        raise UserError(
            f"the checkpoint of step {step} could not be written to {self._folder} ({reason}; {free / 1e9:,.3f} GB are "
            f"free there); make room and start the same command again, which continues from the checkpoint before"
        )


def check_loadable(folder: str, *, finetune: bool) -> None:
    """Raises UserError if there is nothing to load: Megatron itself would go on with random weights."""
    path = Path(folder)
    if finetune and not _has_manifests(path):
        if not (path / TRACKER).is_file():
            raise UserError(f"--load {folder} holds no Megatron checkpoint (no {TRACKER}); give a checkpoints folder")
    elif not whole_checkpoints(path):
        raise _none_whole(path, [(s, find_damage(_folder_of(path, s), contents=False)) for s in saved_steps(path)])


def saved_steps(folder: Path) -> list[int]:
    """Steps with a checkpoint in ``folder``, whole or damaged, oldest first."""
    return sorted(_step_of(path) for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name))


def whole_checkpoints(folder: str | Path) -> list[int]:
    """Steps whose checkpoint has all its files in full length, oldest first; contents are looked at when loading."""
    path = Path(folder)
    return [step for step in saved_steps(path) if find_damage(_folder_of(path, step), contents=False) is None]


def _has_manifests(folder: Path) -> bool:
    """False for checkpoints that are not a run's but plain Megatron's."""
    return any(folder.glob(f"iter_*/{MANIFEST}"))


def _none_whole(folder: Path, damages: Sequence[tuple[int, str | None]]) -> UserError:
    seen = "; ".join(f"{_folder_of(folder, step).name}: {damage}" for step, damage in damages)
    return UserError(
        f"{folder} holds no whole checkpoint of a run ({seen or 'no folder iter_*'}); bring one back, give another "
        f"--load, or start anew under another --run-name"
    )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))


def _folder_of(folder: Path, step: int) -> Path:
    return folder / f"iter_{step:07d}"


def _gather[T](value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
