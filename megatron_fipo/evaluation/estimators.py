"""Estimates from n sampled responses to each prompt."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.observe.statistics import wilson_interval


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The chance that k of the ``samples`` responses, drawn without replacement, hold one of the ``correct`` ones.

    1 - C(samples - correct, k) / C(samples, k): unbiased for the chance that one of k responses is correct
    (arXiv 2107.03374, eq. 1).
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie in 1..{samples} (samples), not {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(correct: int, wrong: Sequence[int]) -> float:
    """Is the answer that most responses give correct? ``wrong`` are the sizes of the other classes of equal answers.

    The chance of it, if a tie is broken at random.
    """
    most = max([correct, *wrong])
    return 1.0 / (1 + list(wrong).count(most)) if correct == most > 0 else 0.0


def accuracy_interval(correct_PN: NDArray[np.bool_]) -> tuple[float, float]:
    """95 % confidence interval of the mean accuracy; prompts are independent, responses to one prompt are not.

    Wilson's interval for the effective number of independent responses p (1 - p) / SE^2, where SE is the standard
    error of the mean over prompts.
    """
    by_prompt = correct_PN.mean(1)
    accuracy, prompts = float(by_prompt.mean()), len(by_prompt)
    variance = float(by_prompt.var(ddof=1)) / prompts if prompts > 1 else 0.0
    effective = accuracy * (1 - accuracy) / variance if variance else prompts
    return wilson_interval(accuracy, min(effective, correct_PN.size))


def summarize(
    correct_PN: NDArray[np.bool_],
    tokens_PN: NDArray[np.int64],
    truncated_PN: NDArray[np.bool_],
    failed_PN: NDArray[np.bool_],
    majority_P: NDArray[np.float64],
) -> dict[str, float]:
    """The metrics of P prompts with N responses each; ``majority_P`` as :func:`majority`.

    ``accuracy`` is avg@N. pass@k is given for powers of two up to N, and N.
    """
    prompts, samples = correct_PN.shape
    low, high = accuracy_interval(correct_PN)
    metrics = {
        "accuracy": float(correct_PN.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "length_mean": float(tokens_PN.mean()),
        "length_median": float(np.median(tokens_PN)),
        "length_q25": float(np.quantile(tokens_PN, 0.25)),
        "length_q75": float(np.quantile(tokens_PN, 0.75)),
        "length_max": float(tokens_PN.max()),
        "truncated_fraction": float(truncated_PN.mean()),
        "errors": int(failed_PN.sum()),
        "n": prompts,
        "responses": correct_PN.size,
    }
    if samples > 1:
        right_P = correct_PN.sum(1).tolist()
        for k in sorted({2**i for i in range(samples.bit_length())} | {samples}):
            metrics[f"pass@{k}"] = float(np.mean([pass_at_k(right, samples, k) for right in right_P]))
        metrics[f"cons@{samples}"] = float(majority_P.mean())
    return metrics
