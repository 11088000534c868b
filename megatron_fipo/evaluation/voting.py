"""cons@k: which answer most responses give, equal answers counted together."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_fipo.evaluation.estimators import majority

Equal = Callable[[Sequence[tuple[int, str, str]]], list[bool]]
"""(number of the prompt, answer, another answer) -> are the answers equal?"""


def consensus(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]], equal: Equal) -> list[float]:
    """For each prompt: is the majority of its responses correct? See :func:`majority`.

    ``answers`` are the responses' final answers; None casts no vote. Correct answers are one class. The wrong ones of
    equal text are one, and are joined by ``equal``, all prompts at once, where it can decide the vote.
    """
    wrong = [
        Counter(" ".join(a.split()) for a, right in zip(texts, rights, strict=True) if a is not None and not right)
        for texts, rights in zip(answers, correct, strict=True)
    ]
    pairs = [
        (prompt, a, b)
        for prompt, (votes, rights) in enumerate(zip(wrong, correct, strict=True))
        if 0 < sum(rights) <= votes.total()
        for a, b in itertools.combinations(votes, 2)
    ]
    joined = equal(pairs)
    leaders = [{text: text for text in votes} for votes in wrong]
    for (prompt, a, b), same in zip(pairs, joined, strict=True):
        if same:
            leader = leaders[prompt]
            old, new = leader[b], leader[a]
            leaders[prompt] = {text: new if first == old else first for text, first in leader.items()}
    sizes = [Counter[str]() for _ in wrong]
    for prompt, votes in enumerate(wrong):
        for text, count in votes.items():
            sizes[prompt][leaders[prompt][text]] += count
    return [majority(sum(rights), list(size.values())) for rights, size in zip(correct, sizes, strict=True)]
