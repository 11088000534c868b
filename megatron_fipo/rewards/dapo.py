r"""DAPO's rule (arXiv 2503.14476): the last ``Answer:`` line, normalised, equals the reference as text.

The rule compares strings, so 1/2 is not 0.5. What the normalisation forgives is what Minerva's does (arXiv 2206.14858,
appendix D.1): articles, spaces, common units and English nouns, ``$`` and ``\text``, missing braces after ``\frac``
and ``\sqrt``, thousands separators, everything before the last ``=``.
Leading zeros are ours: AIME publishes 033 for 33.
"""

import re

from megatron_fipo.rewards.final_answer import last_answer_line, last_boxed

WINDOW = 300
"""Only so many characters at the end of a response are looked at."""

UNIT_WORDS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "points", "feet",
    "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples",
)  # fmt: skip
_DECORATION = (
    r"\text{s}", r"\text{.}", r"\text{}^2", r"\text{}^3", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;",
    r"\,", r"\!", r"\ldots", "{,}", '"', r"\dots",
)  # fmt: skip
_DROPPED = re.compile("|".join(map(re.escape, UNIT_WORDS + _DECORATION)))
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|overline)\{(.*?)\}")
_BARE_FRACTION = re.compile(r"frac([^{])(.)")
_BARE_ROOT = re.compile(r"sqrt([^{\[])")


def score(text: str, answer: str) -> float:
    r"""1.0 if the last ``Answer:`` line (without one: the last ``\boxed{}``) is ``answer``, else 0.0."""
    found = final_answer(text)
    return float(found is not None and normalize(found) == normalize(answer))


def final_answer(text: str) -> str | None:
    r"""The last ``Answer:`` line at the end of a response, without one the last ``\boxed{}``, as they stand there."""
    end = text[-WINDOW:]
    found = last_answer_line(end)
    return last_boxed(end) if found is None else found


def normalize(answer: str) -> str:
    """The form in which answers are compared."""
    answer = answer.rsplit("=", 1)[-1]
    answer = re.sub(r"\ban? ", "", answer)
    answer = answer.replace(".$", "$").replace(r"\$", "").replace(r"\ ", "").replace(" ", "").rstrip(".")
    answer = answer.replace("mbox", "text").replace(r",\text{and}", ",").replace(r"\text{and}", ",")
    answer = answer.replace(r"\text{m}", "")
    answer = _DROPPED.sub("", answer)
    boxed = last_boxed(answer)
    answer = answer if boxed is None else boxed
    if (formula := re.search(r"\$(.+?)\$", answer)) is not None:
        answer = formula[1]
    answer = _WRAPPED.sub(r"\1", answer)
    answer = _BARE_ROOT.sub(r"sqrt{\1}", _BARE_FRACTION.sub(r"frac{\1}{\2}", answer)).replace("$", "")
    digits = answer.replace(",", "")
    return digits.lstrip("0") or "0" if digits.isdecimal() else answer
