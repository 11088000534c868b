"""Verifiers and reward functions: from a response's text to right or wrong, and to a reward."""
