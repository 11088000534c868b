"""Models that SGLang loads in place of its own, named to it by SGLANG_EXTERNAL_MODEL_PACKAGE."""
