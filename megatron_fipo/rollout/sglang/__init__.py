"""Rollouts on SGLang servers, which the run starts itself or attaches to."""
