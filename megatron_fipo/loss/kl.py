"""The KL of the policy to a reference model, estimated on the policy's own samples.

With d = log(pi / pi_ref) of a token drawn from pi, the estimators of KL(pi || pi_ref) in Schulman's note "Approximating
KL divergence" (2020) are

    k1 = d                  unbiased, of either sign
    k2 = d^2 / 2            biased, small variance
    k3 = exp(-d) - 1 + d    unbiased, never negative; what GRPO uses (arXiv 2402.03300, Eq. 4)

An unbiased value need not have an unbiased gradient. As a term of the loss, with samples of the present policy, the
expected gradient of k2 is that of KL(pi || pi_ref), that of k3 is that of KL(pi_ref || pi), and that of k1 is 0
(E[grad log pi] = 0): k1 there is noise alone. In the reward all three are numbers, and k1 gives the gradient of
KL(pi || pi_ref).
"""

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")

MAX_LOG_RATIO = 20.0  # d is clamped to +- this: exp(-d) stays finite, and beyond it there is no gradient


def check_estimator(estimator: str) -> None:
    """Raises ValueError unless it is one of KL_ESTIMATORS."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, not {estimator!r}")


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, mask_T: Tensor, estimator: str) -> Tensor:
    """[T] like logp_T: the estimate at each token of the mask, 0 elsewhere; differentiable in logp_T.

    logp_T, ref_logp_T: [T], log-probs under the policy and the reference. mask_T: bool [T]; what lies outside it, NaN
    included, has no influence.
    """
    check_estimator(estimator)
    d_T = torch.where(mask_T, logp_T - ref_logp_T.detach(), 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return d_T
    if estimator == "k2":
        return d_T.square() / 2
    return torch.expm1(-d_T) + d_T
