"""Mathematical equality by math-verify (https://github.com/huggingface/Math-Verify), which parses LaTeX into sympy.

Its timeouts are off: they need the main thread's alarm signal, and a killed process is the stronger limit. Its plain
expressions are off too: they go through sympy's ``parse_expr``, which is Python's ``eval``; LaTeX has a grammar.

math-verify is imported on first use, which takes a fifth of a second.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_fipo.rewards.dapo import UNIT_WORDS
from megatron_fipo.rewards.final_answer import final_answer

logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its timeouts are off

LONGEST_ANSWER = 1000
"""Characters; a longer answer is not parsed, and wrong. The longest reference answers have a tenth of it."""

# Exponents of three digits at most: 1e999999999 as an exact number would fill the memory.
_NUMBER = re.compile(r"[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?|\d+/0*[1-9]\d*)")
_EXPONENT = re.compile(r"(?<=[\d.])[eE]([+-]?\d{1,3})$")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
_UNIT = re.compile(rf"(?<=\d)(?:\s*\b(?:{'|'.join(UNIT_WORDS)})\b)+$")
# One of each form: parsing the first of a kind builds tables (0.1 s) that workers then share.
_EXAMPLES = (
    r"\frac{1}{2}", "0.5", "1,000", "-3", r"50\%", "x=5", r"5\text{ cm}", "(1,2)", r"[1,\infty)", r"\{1,2\}",
    r"2\sqrt{2}", r"x^2+2x+1", r"90^\circ", "x<3", r"\begin{pmatrix}1\\2\end{pmatrix}", "1,2", r"\frac{\pi}{3}",
    r"\text{even}", "6-5i", r"e^{2x}", r"\sin x", r"\log_2 3", r"1\pm\sqrt{2}", r"(-\infty,3)\cup(5,6]",
)  # fmt: skip


def score(text: str, answer: str) -> float:
    """1.0 if the response's final answer equals ``answer``, else 0.0."""
    found = final_answer(text)
    return float(found is not None and equivalent(answer, found))


def equivalent(gold: str, answer: str) -> bool:
    """Is ``answer`` mathematically equal to ``gold``? Both are LaTeX, with or without ``$``. Not symmetric.

    Equal texts, and plain numbers where that is sure (math-verify rounds decimals), are decided without parsing.
    """
    if len(answer) > LONGEST_ANSWER:
        return False
    gold, answer = _bare(gold), _bare(answer)
    if gold == answer != "":
        return True
    number, answer_number = _number(gold), _number(answer)
    if number is not None and answer_number is not None:
        if number == answer_number:
            return True
        if number.is_integer() and answer_number.is_integer():
            return False
    from math_verify import verify

    parsed_gold, parsed_answer = _parse(gold), _parse(answer)
    return bool(parsed_gold and parsed_answer and verify(parsed_gold, parsed_answer, timeout_seconds=None))


@lru_cache(maxsize=1)
def load() -> None:
    """Import math-verify and build its parser's tables."""
    for example in _EXAMPLES:
        equivalent("y", example)


def _bare(latex: str) -> str:
    latex = latex.replace(r"\$", "").strip().removesuffix(".").strip("$").removeprefix(r"\(").removesuffix(r"\)")
    return _UNIT.sub("", latex.strip().removesuffix("."))


def _number(text: str) -> Fraction | None:
    text = _FRACTION.sub(r"\1/\2", _THOUSANDS.sub("", text))
    return Fraction(text) if _NUMBER.fullmatch(text) else None


def _parse(latex: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    latex = _EXPONENT.sub(r"\\times 10^{\1}", latex)  # to the LaTeX grammar, e is Euler's number
    only_boxed = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(rf"\boxed{{{latex}}}", only_boxed, parsing_timeout=None)
