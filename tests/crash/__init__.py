"""Crash test of checkpoints: kills all parts of a local run at instants drawn from a seed, damages what lies in the
store, and looks whether every recovery goes on from a checkpoint that verifies, on the exact sample."""
