"""The run folder: atomic writes, and cutting the files back for a resume."""

import json
import math

import pytest

from megatron_fipo.errors import UserError
from megatron_fipo.observe.run_folder import RunFolder, read_jsonl, write_json, write_text


def test_paths(tmp_path):
    folder = RunFolder(tmp_path, "a")
    folder.create()
    assert folder.metrics == tmp_path / "a" / "metrics.jsonl"
    assert folder.checkpoints == tmp_path / "a" / "checkpoints"
    assert folder.path.is_dir() and not folder.metrics.exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="--run-name"):
        RunFolder(tmp_path, name)


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path):
    folder = RunFolder(tmp_path, "a")
    folder.create()
    lines = [json.dumps({"step": step, "x": 0.1 * step}) + "\n" for step in range(5)]
    folder.metrics.write_text("".join(lines) + '{"step": 5, "x": 0.')
    folder.samples.write_text("".join(lines))
    folder.truncate_after(2)
    assert folder.metrics.read_text() == folder.samples.read_text() == "".join(lines[:3])


def test_truncate_keeps_floats_bit_for_bit(tmp_path):
    folder = RunFolder(tmp_path, "a")
    folder.create()
    value = math.pi * 1e-7
    folder.metrics.write_text(json.dumps({"step": 1, "updates": [{"x": value}]}) + "\n")
    folder.truncate_after(1)
    assert read_jsonl(folder.metrics)[0][0]["updates"][0]["x"] == value


def test_damaged_lines_are_counted(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_bytes(b'{"step": 1}\n{"st\n[1]\n{"no step": 1}\n{"step": 2, "text": "\xe2\x82')
    rows, damaged = read_jsonl(file)
    assert [row["step"] for row in rows] == [1]
    assert damaged == 4


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "summary.json"
    write_json(file, {"steps": 1})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half of it \ud800")
    assert json.loads(file.read_text()) == {"steps": 1}


def test_json_has_no_nan_and_text_for_unknown_types(tmp_path):
    import torch

    write_json(tmp_path / "a.json", {"nan": math.nan, "list": [math.inf, 1.5], "dtype": torch.bfloat16})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"nan": None, "list": [None, 1.5], "dtype": "torch.bfloat16"}


def test_environment_tells_versions_and_machine(tmp_path):
    import torch

    folder = RunFolder(tmp_path, "a")
    folder.create()
    folder.write_environment()
    environment = json.loads(folder.environment.read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["packages"]["megatron-core"]
    assert environment["cores"] >= 1 and environment["cpu"]
    assert environment["git_commit"] is None or len(environment["git_commit"].removesuffix("-dirty")) == 40
