"""Faults made on purpose (``lockstep inject``): ordered of a worker that runs, and carried out in it."""
