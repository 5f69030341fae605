"""The results as lines for a terminal."""

from collections.abc import Iterator

from bench.rounds import Comparison

COLUMNS = {
    "rate": "per s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "cpu_us": "own CPU us",
    "postgres_cpu_us": "Postgres CPU us",
    "statements": "statements",
    "wal_syncs": "WAL syncs",
}


def as_text(name: str, row: Comparison) -> str:
    """Return one row: its ratios, then what each contender did, per unit."""
    return "\n".join(_lines(name, row))


def _lines(name: str, row: Comparison) -> Iterator[str]:
    yield f"{name} ({row.unit})"
    for other, found in row.ratios.items():
        cost = row.cost_ratios[other]
        yield (
            f"  ÷ {other:<22}{found.median:6.2f} x the rate ({found.low:.2f} to {found.high:.2f}),"
            f" {cost.median:.2f} x the processor time ({cost.low:.2f} to {cost.high:.2f})"
        )
    for figure, found in row.figures.items():
        spread = "" if found.low == found.high else f" ({found.low:.2f} to {found.high:.2f})"
        yield f"  {figure:<40}{found.median:9.2f}{spread}"
    if row.contenders:
        yield f"  {'':<16}" + "".join(f"{title:>16}" for title in COLUMNS.values())
    for contender, sample in row.contenders.items():
        values = (getattr(sample, column) for column in COLUMNS)
        yield f"  {contender:<16}" + "".join(f"{'-' if value is None else f'{value:.1f}':>16}" for value in values)
