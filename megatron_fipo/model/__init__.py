"""The policy: a Megatron GPTModel built from a Hugging Face configuration, and its log-probs."""
