"""Verifiers: from a response's text to right or wrong."""

from megatron_fipo.rewards.verify import Verdict, check_source, verify

__all__ = ["Verdict", "check_source", "verify"]
