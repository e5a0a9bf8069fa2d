"""The Grafana dashboards of the chart; `make generate` writes their JSON."""

from __future__ import annotations

import json
from pathlib import Path

from dashboard_fleet import fleet_dashboard
from dashboard_job import job_dashboard

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "charts/lockstep/files/dashboards"


def files() -> dict[Path, str]:
    """File → content."""
    dashboards = {"job": job_dashboard(), "fleet": fleet_dashboard()}
    return {
        FOLDER / f"{name}.json": json.dumps(made, indent=2, ensure_ascii=False) + "\n"
        for name, made in dashboards.items()
    }
