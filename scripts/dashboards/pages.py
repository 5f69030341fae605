"""Every dashboard, as files."""

from collections.abc import Mapping

from scripts.dashboards.database import DATABASE
from scripts.dashboards.intake import INTAKE
from scripts.dashboards.model import render
from scripts.dashboards.outbox import OUTBOX
from scripts.dashboards.overview import OVERVIEW
from scripts.dashboards.sagas import SAGAS

DASHBOARDS = (OVERVIEW, INTAKE, OUTBOX, SAGAS, DATABASE)


def files() -> Mapping[str, str]:
    """Return the JSON of each dashboard by the name of its file."""
    return {f"{dashboard.name}.json": render(dashboard, DASHBOARDS) for dashboard in DASHBOARDS}
