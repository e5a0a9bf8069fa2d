"""Optimizers, the learning rate and the size of the batch over the steps."""
