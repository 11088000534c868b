"""Checkpoints are whole or absent: damaged, killed, asynchronous and failed saves, with a real model and real files."""

import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoint_trainer
import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo.checkpoint.integrity import find_damage, record_files, write_manifest
from megatron_fipo.checkpoint.state import saved_steps, whole_checkpoints
from megatron_fipo.errors import UserError
from megatron_fipo.parallel.replicas import Replicas
from megatron_fipo.rollout.leftovers import Leftovers

LEFTOVERS = ("__0_leftovers.safetensors", "leftovers.safetensors")
FILES = (".metadata", "__0_0.distcp", *LEFTOVERS, "manifest.json", "metadata.json", "rl_state.json")


@pytest.fixture(scope="module")
def trainer(megatron, trained_base):
    yield checkpoint_trainer.open_trainer(trained_base)
    checkpoint_trainer.close_trainer()


@pytest.fixture
def saved(trainer, tmp_path):
    """A folder with checkpoints of the steps 1, 2 and 3."""
    trainer.warnings.clear()
    checkpoints = trainer.checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(trainer.become(step))
    return tmp_path


def loads(trainer, folder) -> int:
    """The step of the checkpoint that is loaded, which is in every respect as it was saved."""
    trainer.become(99)
    state = trainer.checkpoints(folder).load(folder)
    assert trainer.is_at(state.step, state)
    return state.step


def flip_bit(path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_checkpoint_holds_everything_and_the_newest_is_loaded(trainer, saved):
    assert {path.name for path in (saved / "iter_0000003").iterdir()} == {*FILES}
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert {path.name for path in saved.iterdir()} == {
        "iter_0000001", "iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt",
    }  # fmt: skip
    assert loads(trainer, saved) == 3 and trainer.warnings == []


def test_leftovers_are_shared_out_over_another_number_of_replicas(megatron, tmp_path):
    """Written by two replicas, read by one and by three."""
    expected, one = checkpoint_trainer.made_up_leftovers(4, groups=7), Replicas.current()
    for replica in (1, 0):  # in one process both have the rank 0, and with it the name of the file
        held = {visit: expected.held[visit] for visit in expected.visits[replica::2]}
        Leftovers(expected.visits, expected.table, held).write(tmp_path, replace(one, rank=replica, size=2))
        (tmp_path / LEFTOVERS[0]).rename(tmp_path / f"__{replica + 5}_leftovers.safetensors")
    assert checkpoint_trainer.same_leftovers(Leftovers.read(tmp_path, one), expected)
    for replica in range(3):
        found = Leftovers.read(tmp_path, replace(one, rank=replica, size=3))
        held = {visit: expected.held[visit] for visit in expected.visits[replica::3]}
        assert held and checkpoint_trainer.same_leftovers(found, replace(expected, held=held))


def test_a_checkpoint_without_leftovers_loads(trainer, tmp_path):
    checkpoints = trainer.checkpoints(tmp_path)
    checkpoints.save(replace(trainer.become(1), leftovers=None))
    assert not any((tmp_path / "iter_0000001" / name).exists() for name in LEFTOVERS)
    assert checkpoints.load(tmp_path).leftovers is None


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_loaded(trainer, saved, name):
    path, rng = saved / "iter_0000003" / name, random.Random(name)
    content = path.read_bytes()
    for damage in (
        path.unlink,
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(content[: len(content) // 2]),
        lambda: path.write_bytes(content + b" "),
        lambda: flip_bit(path, rng),
        lambda: flip_bit(path, rng),
    ):
        trainer.warnings.clear()
        path.write_bytes(content)
        damage()
        if name == "manifest.json" and path.exists() and path.read_bytes() == content + b" ":
            continue  # a space behind its JSON changes nothing
        assert loads(trainer, saved) == 2
        assert len(trainer.warnings) == 1 and "iter_0000003" in trainer.warnings[0] and name in trainer.warnings[0]


def test_every_flipped_bit_of_the_manifest_is_found(saved):
    folder = saved / "iter_0000001"
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        assert find_damage(folder), bytes(flipped)
    manifest.write_bytes(content)
    assert find_damage(folder) is None


def test_ranks_share_the_reading(saved):
    folder = saved / "iter_0000001"
    flip_bit(folder / "__0_0.distcp", random.Random(0))
    assert [find_damage(folder, part=part, parts=3) is None for part in range(3)] == [True, False, True]


def test_nothing_is_loaded_where_nothing_is_whole(trainer, saved):
    for step in (1, 2, 3):
        flip_bit(saved / f"iter_000000{step}" / "__0_0.distcp", random.Random(step))
    with pytest.raises(UserError, match="no whole checkpoint.*iter_0000003: __0_0.distcp.*iter_0000001"):
        loads(trainer, saved)


def test_only_whole_checkpoints_count_as_kept(trainer, saved):
    flip_bit(saved / "iter_0000003" / "__0_0.distcp", random.Random(0))
    (saved / "iter_0000001" / "rl_state.json").unlink()
    checkpoints = trainer.checkpoints(saved, keep_last=2)
    assert checkpoints.load(saved).step == 2
    checkpoints.save(trainer.become(4))
    assert saved_steps(saved) == [2, 4] and loads(trainer, saved) == 4


def test_a_damaged_checkpoint_is_replaced(trainer, saved):
    flip_bit(saved / "iter_0000003" / ".metadata", random.Random(0))
    checkpoints = trainer.checkpoints(saved, keep_last=2)
    checkpoints.load(saved)
    checkpoints.save(trainer.become(3))
    trainer.warnings.clear()
    assert saved_steps(saved) == [2, 3] and loads(trainer, saved) == 3 and not trainer.warnings


@pytest.fixture
def warm_processes(monkeypatch):
    """A context whose processes are forked from one that has imported everything, but has no threads."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parent, *sys.path))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checkpoint_trainer"])
    return context


@pytest.mark.timeout(900)
def test_sigkill_at_every_write_and_rename_leaves_the_newest_whole(
    trainer, saved, trained_base, tmp_path_factory, warm_processes
):
    """The save of step 4 dies at each of its points in turn; afterwards step 3 loads, or 4 once it is visible."""
    shutil.rmtree(saved / "iter_0000001")
    copies = tmp_path_factory.mktemp("killed")
    loaded: list[int] = []
    died: list[bool] = []
    while not died or died[-1]:
        batch = []
        for point in (len(died) + 1, len(died) + 2):
            folder = copies / str(point)
            shutil.copytree(saved, folder)
            process = warm_processes.Process(
                target=checkpoint_trainer.save_and_die, args=(trained_base, folder, 4, point)
            )
            process.start()
            batch.append((process, folder))
        for process, folder in batch:
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL)
            died.append(process.exitcode != 0)
            tracker = int((folder / "latest_checkpointed_iteration.txt").read_text())
            assert tracker in whole_checkpoints(folder)
            trainer.warnings.clear()
            loaded.append(loads(trainer, folder))
            assert not trainer.warnings  # nothing under a checkpoint's name was ever half of one
            checkpoints = trainer.checkpoints(folder)
            checkpoints.save(trainer.become(5))  # leftovers do not hinder, and go
            expected = {f"iter_000000{step}" for step in (loaded[-1], 5)}
            assert {path.name for path in folder.iterdir()} == {*expected, "latest_checkpointed_iteration.txt"}
            shutil.rmtree(folder)
    assert sum(died) > 30 and loaded == sorted(loaded) and {*loaded} == {3, 4}
    assert [step for step, killed in zip(loaded, died, strict=True) if not killed] == [4] * (len(died) - sum(died))


def test_what_one_rank_meets_all_ranks_know(trainer, saved, trained_base, tmp_path_factory, warm_processes):
    """Two replicas load what one saved; the damage is in a file that the second verifies, which then cannot write."""
    flip_bit(saved / "iter_0000003" / "__0_0.distcp", random.Random(0))
    assert find_damage(saved / "iter_0000003", part=0, parts=2) is None
    results, store = warm_processes.SimpleQueue(), tmp_path_factory.mktemp("store") / "store"
    ranks = [
        warm_processes.Process(
            target=checkpoint_trainer.load_and_fail_to_save, args=(trained_base, saved, store, rank, results)
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = [results.get() for _ in ranks]
    for process in ranks:
        process.join(120)
    trainer.become(2)
    expected = [p.detach().numpy() for p in trainer.chunks[0].parameters()]
    for step, warnings, weights, (elsewhere, unwritable) in found:
        assert "is not the same folder on all nodes: ranks [1] find no run to continue" in elsewhere
        assert step == 2 and len(warnings) == 1 and "__0_0.distcp" in warnings[0]
        assert all(map(np.array_equal, weights, expected))
        assert f"checkpoint of step 4 could not be written to {saved}" in unwritable
    assert loads(trainer, saved) == 2


def test_an_asynchronous_save_holds_the_moment_it_was_asked_for(trainer, tmp_path):
    checkpoints = trainer.checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(trainer.become(1))
    assert multiprocessing.active_children() and not saved_steps(tmp_path)
    trainer.become(2)  # training goes on
    for _ in range(10_000):
        checkpoints.poll()
        if saved_steps(tmp_path):
            break
    assert loads(trainer, tmp_path) == 1
    checkpoints.save(trainer.become(2))
    checkpoints.save(trainer.become(3))  # waits for the one before
    checkpoints.finish()
    assert loads(trainer, tmp_path) == 3 and whole_checkpoints(tmp_path) == [2, 3]


def test_a_killed_asynchronous_writer_is_reported_with_its_step(trainer, saved):
    checkpoints = trainer.checkpoints(saved, asynchronous=True)
    checkpoints.save(trainer.become(4))
    (writer,) = multiprocessing.active_children()
    writer.kill()
    writer.join(30)
    if writer.exitcode == 0:
        pytest.skip("the writer was faster than the signal")
    with pytest.raises(UserError, match="checkpoint of step 4 could not be written"):
        checkpoints.finish()
    assert loads(trainer, saved) == 3


@pytest.fixture(params=["file system", "file size limit"])
def full_disk(request, saved):
    """(folder with steps 1 to 3, function that makes writing fail there)."""
    if request.param == "file size limit":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield saved, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    mount = saved / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", mount], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        for path in saved.glob("iter_*"):
            shutil.copytree(path, mount / path.name)
        used = sum(path.stat().st_blocks * 512 for path in mount.rglob("*"))
        yield mount, lambda: (mount / "ballast").write_bytes(bytes(2**22 - used - 2**18))
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_reported_and_costs_no_checkpoint(trainer, full_disk, asynchronous):
    folder, fill = full_disk
    checkpoints = trainer.checkpoints(folder, keep_last=1, asynchronous=asynchronous)
    state = trainer.become(4)
    fill()
    with pytest.raises(UserError, match=f"checkpoint of step 4 could not be written to {folder}.*GB are free"):
        checkpoints.save(state)
        checkpoints.finish()
    assert loads(trainer, folder) == 3 and whole_checkpoints(folder) == [1, 2, 3]
    assert not [*folder.glob("partial*")]


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_runs_from_a_checkpoints_index(trainer, saved, tmp_path):
    """The manifest is no signature: whoever can write the folder can write that, too."""
    folder, witness = saved / "iter_0000003", tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(witness)))
    write_manifest(folder, {k: v for k, v in record_files(folder, 0).items() if k != "manifest.json"})
    with pytest.raises(CheckpointException, match="must not refer to posix.mkdir"):
        loads(trainer, saved)
    assert not witness.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert witness.exists()


def test_no_code_runs_from_a_checkpoints_objects(megatron, tmp_path):
    dcp.save({"object": Trap(tmp_path / "ran")}, checkpoint_id=tmp_path / "checkpoint")
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        dcp.load({"object": None}, checkpoint_id=tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists()
