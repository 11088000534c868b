"""Weights to and from Hugging Face folders, and the training state."""
