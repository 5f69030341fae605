"""The result of a sweep, as its file has it and the report shows it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class PointResult:
    """A point, and what was wrong after the recovery; nothing, if it recovered."""

    scenario: str
    point: str
    violations: list[str]


@dataclass
class SweepResult:
    """A whole sweep, and what it is a sweep of."""

    started_at: str
    command: str
    versions: Mapping[str, str]
    points: list[PointResult] = field(default_factory=list)

    @property
    def failed(self) -> list[PointResult]:
        """Return the points that did not recover."""
        return [result for result in self.points if result.violations]


def write(result: SweepResult, path: Path) -> None:
    """Write the file that `read` reads."""
    path.write_text(json.dumps(asdict(result), indent=1))


def read(path: Path) -> SweepResult:
    """Read the file that `write` wrote."""
    data = json.loads(path.read_text())
    return SweepResult(**{**data, "points": [PointResult(**point) for point in data["points"]]})
