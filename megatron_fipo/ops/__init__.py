"""The compiled operators, and beside each its fake kernel, its gradient and a plain-torch twin as oracle."""

from megatron_fipo.ops.fused_loss import fused_fipo_loss, future_kl_aggregate
from megatron_fipo.ops.library import has_kernels_for
from megatron_fipo.ops.reference import reference_discounted_scan
from megatron_fipo.ops.scan import discounted_scan

__all__ = ["discounted_scan", "fused_fipo_loss", "future_kl_aggregate", "has_kernels_for", "reference_discounted_scan"]
