"""Durable checkpoints: plain torch distributed checkpoints, manifests with checksums, a pointer that is swapped."""
