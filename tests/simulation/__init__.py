"""A deterministic world for the membership protocol: ``python -m simulation --seeds 1000``.

The cores are the real ones. Everything around them is simulated from one seed: time, network, processes, volumes, the
object store, the operator. ``invariants`` watches every step, join and commit; ``faults`` breaks what can break;
``mutations`` is the list of one-line changes of the rules that the simulation must notice.
"""
