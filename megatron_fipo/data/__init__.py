"""Prompts, samples, and the packed micro-batches made of them."""
