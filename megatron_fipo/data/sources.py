"""Rows of prompt data: JSONL (also .gz, .zst), Parquet and Arrow files, folders of them, and datasets of the Hub."""

import io
import json
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from megatron_fipo.errors import UserError

_JSONL = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".zst")
_TABLES = (".parquet", ".arrow")
_HUB = re.compile(r"(?:hf://datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?(?:/(.+))?")
_BATCH = 1024

RawRow = tuple[str, bytes | dict[str, Any]]
"""(file and row number, the row or its line of JSON)."""


def find_files(spec: str) -> list[Path]:
    """The files of a ``--prompt-data`` or ``--eval-data`` path: a file, a folder's data files, or a Hub dataset's.

    A Hub dataset is ``OWNER/NAME[@REVISION][/FILES]``, FILES with wildcards; it is downloaded into the Hub's cache.

    Raises:
        UserError: there is no such file, or it is of no known format.
    """
    path = Path(spec)
    if path.is_file():
        return [_known(path)]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _format(p) and p.suffix != ".json")
        if not files:
            raise UserError(f"{spec} holds no .jsonl, .parquet or .arrow file; give a file or a folder of them")
        return files
    hub = _HUB.fullmatch(spec)
    if hub is None or spec.startswith((".", "~")) or (hub[3] is None and _format(path)):
        raise UserError(f"prompt data {spec} does not exist; give an existing file, folder or Hub dataset")
    return _hub_files(hub[1], hub[2], hub[3])


def source_name(spec: str) -> str:
    """The source of rows that name none: the file's or folder's name, a Hub dataset's whole one."""
    path = Path(spec)
    return path.name if path.exists() else spec


def read_rows(path: Path) -> Iterator[RawRow]:
    """A file's rows, numbered from 1 (JSONL: its lines, empty ones skipped). Raises UserError for a damaged file."""
    number = 0
    try:
        rows: Iterator[bytes | dict[str, Any]] = _lines(path) if _format(path) == "jsonl" else _records(path)
        for number, row in enumerate(rows, start=1):
            if row:
                yield f"{path}, row {number}", row
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read after row {number} ({reason}); write or download it again") from error


def decode(where: str, row: bytes | dict[str, Any]) -> dict[str, Any]:
    """The row as an object. Raises UserError."""
    if isinstance(row, dict):
        return row
    try:
        value = json.loads(row)  # UTF-8, as JSON asks
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not JSON ({error}); write one JSON object per line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {type(value).__name__}; write one JSON object per line")
    return value


def _format(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix in _JSONL:
        return "jsonl"
    return path.suffix if path.suffix in _TABLES else None


def _known(path: Path) -> Path:
    if _format(path) is None:
        raise UserError(f"{path} is of no known format; give .jsonl (also .gz, .zst), .parquet or .arrow")
    return path


def _lines(path: Path) -> Iterator[bytes]:
    with io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"), buffer_size=1 << 20) as file:
        for line in file:
            yield line.strip()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
        return
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"  # else a stream, as `datasets` writes it
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH):
                yield from batch.slice(start, _BATCH).to_pylist()


def _hub_files(name: str, revision: str | None, pattern: str | None) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [pattern] if pattern else [f"*{s}" for s in (*_JSONL, *_TABLES)] + [f"*{c}" for c in _COMPRESSED]
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"prompt data {name} is no file here, and the Hub does not give it ({str(error).splitlines()[0]}); "
            f"check the name and the connection, or download it and give the file"
        ) from error
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _format(p))
    files = [p for p in found if pattern is None or fnmatch(str(p.relative_to(folder)), pattern)]
    return _one_split(name, folder, files, pattern)


def _one_split(name: str, folder: Path, files: Sequence[Path], pattern: str | None) -> list[Path]:
    """A dataset of several files is training and test data as a rule: the user has to say which."""
    if len(files) == 1 or (files and pattern):
        return list(files)
    names = ", ".join(str(p.relative_to(folder)) for p in files[:10])
    raise UserError(
        f"the Hub dataset {name} has {len(files)} data files"
        + (f" that match {pattern}" if pattern else "")
        + (f" ({names}); name those to read, for example {name}/{files[0].relative_to(folder)}" if files else "")
    )
