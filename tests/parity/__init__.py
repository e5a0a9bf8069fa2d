"""Every composition of parallelisms against a single process, in float64, where rounding cannot hide a mistake.

``python -m parity --list`` names the cells of the matrix, ``python -m parity NAME`` runs one, ``python -m parity --full
--write`` all of them and writes docs/reference/parity.md. pytest runs the covering set.
"""
