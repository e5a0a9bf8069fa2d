"""What is known of the cluster's nodes across jobs: their faults, their score, which of them new pods stay away from.

``blame`` reads faults out of jobs, ``score`` weighs them, ``exclusion`` decides, ``notices`` knows what taints and
conditions of others mean. All of it is pure.
"""
