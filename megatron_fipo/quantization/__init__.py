"""FP8 weights: one quantiser for the weight sync, for checkpoints and for checks, and who quantises which tensors."""
