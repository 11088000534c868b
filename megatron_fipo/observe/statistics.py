"""Confidence intervals of accuracies and the spread of curves."""

import math

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal


def wilson_interval(accuracy: float, n: float) -> tuple[float, float]:
    """95 % confidence interval of a fraction measured on `n` independent answers (Wilson's score interval).

    Unlike the normal approximation it stays inside [0, 1] and is right near 0 and 1, where a base model starts.
    """
    if n <= 0:
        raise ValueError(f"an interval needs at least one answer, got n = {n}")
    z2 = Z_95**2
    center = (accuracy + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z2 / (4 * n * n))
    # The exact bounds at accuracy 0 and 1 are 0 and 1; rounding must not put them a hair outside.
    return max(0.0, center - half), min(1.0, center + half)
