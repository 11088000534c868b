"""Whether a checkpoint folder is whole: a manifest of its files with sizes and checksums, written last.

Each rank reads its own files once more after they are written, so that the checksums come from its page cache and the
work grows with no rank's share. CRC-32 finds every flipped bit, and any longer damage but one in four billion.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_VERSION = 1
_CHUNK_BYTES = 2**23


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and the CRC-32 of its content."""

    bytes: int
    crc32: str


def record_files(folder: Path, rank: int) -> dict[str, FileRecord]:
    """Flush to disk and describe the files that ``rank`` wrote; the first rank takes all that carry no rank's name."""
    records = {}
    for path in folder.iterdir():
        owner = re.match(r"__(\d+)_", path.name)  # torch.distributed.checkpoint's name for a rank's file
        if path.is_file() and rank == (int(owner[1]) if owner else 0):
            _sync(path)
            records[path.name] = FileRecord(path.stat().st_size, _crc32(path))
    return records


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest, and flush it and the folder's entries to disk: now the folder is whole."""
    files = {name: asdict(record) for name, record in sorted(records.items())}
    manifest = {"version": _VERSION, "files": files, "crc32": _crc32_of_table(files)}
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def find_damage(folder: Path, *, part: int = 0, parts: int = 1, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None.

    Names and sizes are checked always; ``contents`` of every ``parts``-th file from ``part`` on, so that ranks can
    share the reading.
    """
    try:
        records = _read_manifest(folder)
        for i, (name, record) in enumerate(records.items()):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != record.bytes:
                return f"{name} has {size:,} bytes where {record.bytes:,} were written"
            if contents and i % parts == part and _crc32(path) != record.crc32:
                return f"{name} does not hold what was written (checksum)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):  # whatever a damaged manifest turns out to be
        return f"{MANIFEST} is damaged"
    return None


def write_durably(path: Path, text: str) -> None:
    """Write a file so that a reader, a crash or a power cut meets the old content or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def move_durably(source: Path, target: Path) -> None:
    """Rename, and have the new name on disk before returning."""
    source.rename(target)
    _sync(target.parent)


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if manifest["version"] != _VERSION or manifest["crc32"] != _crc32_of_table(manifest["files"]):
        raise ValueError("not as it was written")
    return {name: FileRecord(**record) for name, record in manifest["files"].items()}


def _crc32_of_table(files: Any) -> str:
    return f"{zlib.crc32(json.dumps(files).encode()):08x}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> str:
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
