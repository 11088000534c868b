"""Rollout engines behind one interface, and the collection of a step's samples."""
