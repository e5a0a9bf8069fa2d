"""What an agent says to a worker that runs, and where: ``control.json`` in the worker's folder, and a signal.

``{"leave": true}``
    The generation is over: come out of it, whatever you are in, and rest. The answer is ``idle.json``.
``{"join": folder}``
    To one that rests: go on with the orders in this folder, of a newer generation. It is the worker's folder from now
    on.

Standard library only: both sides import it.
"""

from __future__ import annotations

import signal

CONTROL_SIGNAL = signal.SIGRTMIN + 1
CONTROL = "control.json"
IDLE = "idle.json"
"""``at`` (Unix seconds), and ``error`` where the worker left unasked, having lost a peer."""
