"""Checks that a run consumed exactly its samples, independently of the trainer: plain Python, no shared code."""
