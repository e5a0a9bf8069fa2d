"""Every decision of the operator, as pure functions: no I/O, no clock, no client.

``plan.plan`` is the one to read first; ``observed`` is what it sees, ``actions`` what it may ask for.
"""

from lockstep_operator.plan.actions import Plan
from lockstep_operator.plan.observed import Observed
from lockstep_operator.plan.plan import plan

__all__ = ["Observed", "Plan", "plan"]
