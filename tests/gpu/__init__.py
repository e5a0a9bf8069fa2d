"""What only a GPU can show: ``python -m gpu``, for a machine that has one. Nothing here runs in CI.

Each check is a module of this package with ``run(folder) -> dict``: it raises AssertionError where something is wrong,
and what it returns is written down. They run one after another, each in a process of its own with a time limit, so that
what one of them breaks, the others don't see.
"""
