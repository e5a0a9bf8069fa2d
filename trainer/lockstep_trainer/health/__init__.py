"""Whether a node is fit to train: what its GPUs and host tell, what they do under load, and what is wrong with that.

``nvml`` and ``host`` read, ``burnin`` and ``collectives`` measure, ``classify`` finds by the table in
``findings.yaml``; ``python -m lockstep_trainer.health`` does it all and prints a table.
"""
