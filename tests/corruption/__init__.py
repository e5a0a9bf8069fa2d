"""Bits that flip in tiny models on many ranks, and what ring replay makes of them."""
