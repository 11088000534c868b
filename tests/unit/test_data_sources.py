"""Files, folders and Hub datasets in every format and layout, and what is said about bad ones."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megatron_fipo.data.layouts import TEMPLATES, Keys, parse_row
from megatron_fipo.data.prompts import read_prompts
from megatron_fipo.data.sources import find_files, read_rows
from megatron_fipo.errors import UserError

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "source": "gsm8k", "metadata": {"n": i}} for i in range(2500)]


def encode(prompt) -> list[int]:
    return [ord(c) for c in str(prompt)]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_zst(path):
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\r\n" for row in ROWS).encode())


def write_parquet(path):
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700)


def write_arrow_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=600)


def write_arrow_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "a.jsonl": write_jsonl,
    "b.jsonl.gz": write_gz,
    "c.json.zst": write_zst,
    "d.parquet": write_parquet,
    "e.arrow": write_arrow_stream,
    "f.arrow": write_arrow_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_prompts(tmp_path, name):
    WRITERS[name](tmp_path / name)
    prompts = read_prompts([str(tmp_path / name)], encode)
    assert [(p.answer, p.source, p.metadata["n"]) for p in prompts] == [(str(i + 1), "gsm8k", i) for i in range(2500)]
    assert list(read_rows(tmp_path / name))[2499][0] == f"{tmp_path / name}, row 2500"


def test_a_folder_is_all_its_data_files(tmp_path):
    (tmp_path / "sub").mkdir()
    write_parquet(tmp_path / "sub" / "one.parquet")
    write_jsonl(tmp_path / "two.jsonl")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    assert [p.name for p in find_files(str(tmp_path))] == ["one.parquet", "two.jsonl"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no .jsonl"):
        find_files(str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.json.zst", "d.parquet", "e.arrow", "f.arrow"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name} cannot be read after row .*write or download it again"):
        list(read_rows(path))


def test_unknown_formats_and_missing_files_are_named(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(UserError, match="data.csv is of no known format; give .jsonl"):
        find_files(str(tmp_path / "data.csv"))
    for spec in ("nowhere.jsonl", "./a/b", "data/nowhere.parquet", "/a/b", "~/data/x", "a"):
        with pytest.raises(UserError, match="does not exist; give an existing file, folder or Hub dataset"):
            find_files(spec)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The Hub's cache with two datasets, as a download leaves it; nothing is asked for over the network."""
    import huggingface_hub.constants

    for name, files in {"lab/one": ["data/only.jsonl"], "lab/two": ["main/train.jsonl", "main/test.jsonl"]}.items():
        folder = tmp_path / f"datasets--{name.replace('/', '--')}"
        for file in files:
            path = folder / "snapshots" / "abc123" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_hub_datasets_are_read_from_the_hubs_cache(hub_cache):
    for spec in ("lab/one", "hf://datasets/lab/one", "lab/one@main", "lab/one/data/only.jsonl", "lab/one@main/data/*"):
        assert [p.name for p in find_files(spec)] == ["only.jsonl"], spec
    assert [p.name for p in find_files("lab/two/main/te*")] == ["test.jsonl"]
    with pytest.raises(UserError, match=r"has 2 data files .main/test.jsonl, main/train.jsonl.; name those"):
        find_files("lab/two")
    with pytest.raises(UserError, match="lab/three is no file here, and the Hub does not give it"):
        find_files("lab/three")
    with pytest.raises(UserError, match="lab/two has 0 data files that match dev"):
        find_files("lab/two/dev*")


USER = [{"role": "user", "content": "1+1?"}]
VERL = {
    "data_source": "math_dapo",
    "prompt": USER,
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": "a"},
    "ability": "MATH",
}
AMC23 = {"id": 0, "problem": "p", "question": "q", "answer": 27.0, "url": "u"}
MATH500 = {"problem": "p", "answer": r"\frac{3}{4}", "subject": "Algebra", "level": 2}


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        (VERL, Keys(), ((("user", "1+1?"),), "2", "math_dapo", {"index": "a"})),
        ({"prompt": "1+1?", "label": "2", "metadata": {}}, Keys(), ("1+1?", "2", "file", {})),
        ({"problem": "1+1?", "solution": r"Two: $\boxed{2}$"}, Keys(), ("1+1?", "2", "file", {})),
        ({"problem": "1+1?", "solution": r"\boxed{3}", "answer": 2}, Keys(), ("1+1?", "2", "file", {})),
        ({"id": 60, "problem": "p", "solution": "s", "answer": "204"}, Keys(), ("p", "204", "file", {})),
        (AMC23, Keys(), ("p", "27", "file", {})),
        ({"question": "q", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"}, Keys(), ("q", "1,072", "file", {})),
        (MATH500, Keys(), ("p", r"\frac{3}{4}", "file", {})),
        ({"text": "q", "gold": {"a": 2.5}, "prompt": "no"}, Keys("text", "gold.a"), ("q", "2.5", "file", {})),
    ],
)
def test_published_layouts_are_understood(row, keys, expected):
    question = parse_row("here", row, keys, "file")
    assert (question.prompt, question.answer, question.source, question.metadata) == expected


def test_a_template_goes_around_bare_problems_only():
    keys = Keys(template=TEMPLATES["dapo"])
    bare = parse_row("here", {"question": r"What is $\frac{1}{2}$ in {problem}s?", "answer": "1"}, keys, "file").prompt
    assert r"problem.\n\nWhat is $\frac{1}{2}$ in {problem}s?\n\nRemember".replace("\\n", "\n") in bare
    for prompt in ("Whole.", USER):
        row = {"prompt": prompt, "answer": "1"}
        assert parse_row("here", row, keys, "file") == parse_row("here", row, Keys(), "file")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "2"}, r"no 'prompt', .* or 'input' \(seen: 'answer'\); give --prompt-key"),
        ({"prompt": "q"}, r"no 'reward_model.ground_truth', .* give --answer-key"),
        ({}, "an empty object"),
        ({"prompt": " ", "answer": "2"}, "the prompt is empty"),
        ({"prompt": [], "answer": "2"}, "make it text or a list of chat messages"),
        ({"prompt": 5, "answer": "2"}, "make it text or a list of chat messages"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "the chat message"),
        ({"prompt": ["hello"], "answer": "2"}, "the chat message 'hello'"),
        ({"prompt": "q", "answer": ""}, "'answer' is ''"),
        ({"prompt": "q", "answer": True}, "'answer' is True"),
        ({"prompt": "q", "answer": float("nan")}, "'answer' is nan"),
        ({"prompt": "q", "answer": ["2"]}, "'answer' is \\['2'\\]"),
        ({"prompt": "q", "answer": "reason ####"}, "holds no answer"),
        ({"prompt": "q", "solution": "two"}, "a solution needs"),
        ({"prompt": "q", "answer": "2", "source": 5}, "the source is 5"),
        ({"prompt": "q", "answer": "2", "metadata": "x"}, "'metadata' is a str"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row, reason):
    with pytest.raises(UserError, match=f"here: .*{reason}") as raised:
        parse_row("here", row, Keys(), "file")
    assert "\n" not in str(raised.value)


def test_check_names_every_bad_row(tmp_path):
    good = {"prompt": "1+1", "answer": "2", "source": "gsm8k"}
    rows = [good, "{broken", good | {"answer": "3"}, good | {"prompt": "2+2", "source": "poems"}, good, {"prompt": "x"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    command = [sys.executable, "-m", "megatron_fipo.data", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert [line.split(": ")[0] for line in lines[:4]] == [f"{path}, row {i}" for i in (2, 3, 4, 6)]
    for line, reason in zip(
        lines, ("not JSON", "with the answer '2', here '3'", "'poems'", "--answer-key"), strict=False
    ):
        assert reason in line
    assert lines[4:] == ["6 rows, 4 wrong, 2 duplicates", "          2  gsm8k"]
    fixed = subprocess.run([*command[:4], str(tmp_path / "no.jsonl")], capture_output=True, text=True, timeout=120)
    assert fixed.returncode == 1 and "no.jsonl does not exist" in fixed.stdout
