"""Where a response says its final answer."""

import re

_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_GSM8K_LINE = re.compile(r"####\s*([^\n]+)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_answer_line(text: str) -> str | None:
    """What follows the last ``Answer:`` on its line, stripped; any case."""
    lines = _ANSWER_LINE.findall(text)
    return lines[-1].strip() if lines else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` whose braces close, stripped."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) * (text[end - 1] != "\\")
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def final_answer(text: str) -> str | None:
    r"""The answer that stands last: an ``Answer:`` or GSM8K's ``####`` line, or a ``\boxed{}``, on that line or not."""
    lines = [*_ANSWER_LINE.finditer(text), *_GSM8K_LINE.finditer(text)]
    line = max(lines, key=lambda match: match.start(), default=None)
    boxed = last_boxed(text[line.start() :] if line else text)
    if boxed is not None or line is None:
        return boxed
    return line[1].strip()
