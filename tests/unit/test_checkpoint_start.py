"""Where a command starts, by what it finds in its run's folder."""

import json
import shutil

import pytest

from megatron_fipo.checkpoint.integrity import record_files, write_manifest
from megatron_fipo.checkpoint.start import Start, find_start
from megatron_fipo.errors import UserError
from megatron_fipo.observe.run_folder import RunFolder

COMMAND = ["--lr", "1e-6", "--save-interval", "5"]


@pytest.fixture
def run(tmp_path):
    """A run of COMMAND that was interrupted in step 8."""
    folder = RunFolder(tmp_path, "run")
    folder.create()
    folder.write_arguments({"command_line": COMMAND})
    folder.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(8)))
    return folder


def add_checkpoint(checkpoints, step):
    folder = checkpoints / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "rl_state.json").write_text("{}")
    write_manifest(folder, record_files(folder, 0))
    return folder


def start(run, command=COMMAND, load=None, finetune=False, saves=True):
    return find_start(run, load and str(load), finetune=finetune, command_line=command, saves=saves)


def test_a_new_run_starts_from_the_model_or_from_what_it_is_given(tmp_path):
    run = RunFolder(tmp_path, "run")
    assert start(run) == Start(None, False)
    with pytest.raises(UserError, match="no whole checkpoint"):
        start(run, load=tmp_path)
    add_checkpoint(tmp_path / "other", 3)
    for finetune in (False, True):
        assert start(run, load=tmp_path / "other", finetune=finetune) == Start(str(tmp_path / "other"), finetune)


def test_the_same_command_continues_its_run(run, tmp_path):
    add_checkpoint(run.checkpoints, 5)
    found = start(run)
    assert (found.load, found.weights_only) == (str(run.checkpoints), False) and "continuing" in found.note


@pytest.mark.parametrize("words", [["--load", "elsewhere", "--finetune"], ["--load=elsewhere"]])
def test_its_own_checkpoints_come_before_those_that_it_began_with(run, words):
    run.write_arguments({"command_line": COMMAND + words})
    add_checkpoint(run.checkpoints, 5)
    found = start(run, COMMAND + words, load="elsewhere", finetune="--finetune" in words)
    assert (found.load, found.weights_only) == (str(run.checkpoints), False) and "elsewhere" in found.note


def test_another_command_must_say_that_it_continues(run):
    add_checkpoint(run.checkpoints, 5)
    other = ["--lr", "2e-6", "--save-interval", "5"]
    with pytest.raises(UserError, match="another command.*--load.*checkpoints"):
        start(run, other)
    with pytest.raises(UserError, match="another command"):
        start(run, [*other, "--finetune"], load=run.checkpoints, finetune=True)
    assert start(run, other, load=run.checkpoints) == Start(str(run.checkpoints), False)
    run.arguments.unlink()
    with pytest.raises(UserError, match="another command"):
        start(run)


def test_after_a_continuation_by_hand_the_first_command_continues_too(run):
    add_checkpoint(run.checkpoints, 5)
    run.write_arguments({"command_line": [*COMMAND, "--load", str(run.checkpoints)]})
    assert start(run).load == str(run.checkpoints)


def test_a_finished_run_is_not_repeated(run):
    add_checkpoint(run.checkpoints, 20)
    run.write_summary({"status": "finished", "steps": 20})
    with pytest.raises(UserError, match="finished after 20 steps.*--num-steps"):
        start(run)
    assert start(run, [], load=run.checkpoints).load == str(run.checkpoints)
    run.write_summary({"status": "interrupted", "steps": 20})
    assert start(run).load == str(run.checkpoints)


def test_before_its_first_checkpoint_a_run_that_saves_starts_over_and_says_so(run, tmp_path):
    (run.checkpoints / "partial" / "iter_0000005").mkdir(parents=True)
    found = start(run)
    assert found.load is None and "after step 7" in found.note and "starting over" in found.note
    add_checkpoint(tmp_path / "other", 3)
    assert start(run, load=tmp_path / "other").load == str(tmp_path / "other")
    with pytest.raises(UserError, match="without checkpoints.*remove the folder"):
        start(run, saves=False)


def test_a_run_whose_checkpoints_are_all_damaged_is_never_started_over(run):
    for step in (5, 10):
        (add_checkpoint(run.checkpoints, step) / "rl_state.json").unlink()
    for load in (None, run.checkpoints):
        with pytest.raises(UserError, match="iter_0000005: rl_state.json is missing; iter_0000010"):
            start(run, load=load)
    for path in run.checkpoints.iterdir():
        shutil.rmtree(path)
    with pytest.raises(UserError, match="no folder iter_"):
        start(run, load=run.checkpoints)
    assert "starting over" in start(run).note
