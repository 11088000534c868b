"""What is wrong with prompt data, row by row."""

from collections import Counter
from dataclasses import dataclass, field

from megatron_fipo.data.layouts import Encode, Keys, Messages, parse_row
from megatron_fipo.data.prompts import Resolve
from megatron_fipo.data.sources import RawRow, decode, find_files, read_rows, source_name
from megatron_fipo.errors import UserError


@dataclass
class DataCheck:
    """Reads rows as training would, and goes on after a bad one.

    ``problems`` name file, row, reason and fix. ``sources`` counts good rows; among them are ``duplicates`` of earlier
    prompts and, where ``encode`` is given, prompts of more than ``max_tokens``: ``too_long``.
    """

    keys: Keys
    resolve: Resolve
    encode: Encode | None = None
    max_tokens: int = 0
    rows: int = 0
    duplicates: int = 0
    too_long: int = 0
    problems: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    _answers: dict[str | Messages, tuple[str, str]] = field(default_factory=dict)

    def read(self, spec: str) -> None:
        """Check a file, a folder's files or a Hub dataset's."""
        try:
            files = find_files(spec)
        except UserError as error:
            self.problems.append(str(error))
            return
        for path in files:
            try:
                for raw in read_rows(path):
                    self.rows += 1
                    self._read_row(raw, spec)
            except UserError as error:  # the rest of the file cannot be read
                self.problems.append(str(error))

    def _read_row(self, raw: RawRow, spec: str) -> None:
        where = raw[0]
        try:
            question = parse_row(where, decode(*raw), self.keys, default_source=source_name(spec))
            source = self.resolve(question.source, where)
        except UserError as error:
            self.problems.append(str(error))
            return
        before, answer = self._answers.setdefault(question.prompt, (where, question.answer))
        self.duplicates += before != where
        if answer != question.answer:
            self.problems.append(
                f"{where}: the prompt of {before}, there with the answer {answer!r}, here {question.answer!r}; keep one"
            )
            return
        self.sources[source] += 1
        if self.encode is not None:
            self.too_long += len(self.encode(question.prompt)) > self.max_tokens
