"""FIPO on Megatron-LM: reinforcement learning of reasoning models with dense, future-aware credit."""

__version__ = "0.1.0"
