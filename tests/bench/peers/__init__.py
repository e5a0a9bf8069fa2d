"""The systems that `checkpoint.py` measures side by side, and what they share."""
