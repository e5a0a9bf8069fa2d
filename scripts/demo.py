"""``make demo``: trains a small model on real text, on a real cluster, through a crash and a power cut.

    python scripts/demo.py                   all of it; the cluster is taken down at the end
    python scripts/demo.py --keep            leaves it up, to look around

With LOCKSTEP_DEMO_CLUSTER=existing it uses the cluster of $KUBECONFIG and says which other variables it needs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the checker and the local cluster

from demonstration.story import main

if __name__ == "__main__":
    sys.exit(main())
