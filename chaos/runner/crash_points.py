"""The part of the report about crash points: a picture of every point in its order, and a table of the call sites."""

import html
from collections import Counter, defaultdict
from collections.abc import Sequence

from chaos.runner.tables import table
from chaos.sweep.result import PointResult, SweepResult

BREAK = "\u200b"  # a long name may be continued on the next line here
LIBRARIES = ("postgres", "broker", "partner", "redis", "client")

STYLE = """
:root { --postgres: #1c6dd0; --broker: #c2410c; --partner: #12805c; --redis: #a21caf; --client: #667085; }
@media (prefers-color-scheme: dark) { :root { --postgres: #6cb2ff; --broker: #ff9d5c; --partner: #4ad3a2;
  --redis: #e58cf5; --client: #98a2b3; } }
.points { display: grid; grid-template-columns: max-content 1fr; gap: 8px 16px; align-items: baseline; margin: 16px 0; }
.points > div { display: flex; flex-wrap: wrap; gap: 2px; line-height: 0; }
.points b { font-weight: 500; } .points small, .key { color: var(--soft); font-size: 13px; }
.points i, .key i { width: 10px; height: 10px; border-radius: 2px; display: inline-block; }
.points i.before { opacity: .5; }
.points i.failed { outline: 3px solid var(--bad); opacity: 1; z-index: 1; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; } .key i { margin-right: 6px; }
details { border-bottom: 1px solid var(--line); padding: 6px 0; } summary { cursor: pointer; }
details .n { white-space: nowrap; }
summary span { color: var(--soft); } details table { margin: 8px 0 4px; } details tr:last-child td { border: 0; }
@media (max-width: 560px) { .points { grid-template-columns: 1fr; gap: 4px; } .points > div { margin-bottom: 10px; } }
"""


def as_html(sweep: SweepResult) -> str:
    """Return the section."""
    by_scenario: defaultdict[str, list[PointResult]] = defaultdict(list)
    for result in sweep.points:
        by_scenario[result.scenario].append(result)
    failed = "" if not sweep.failed else f"; <b class=bad>{len(sweep.failed)} did not recover</b>"
    versions = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    return f"""<h2>Every crash point</h2>
<p class="soft">A process was killed at each of {len(sweep.points):,} points of {len(by_scenario)} scenarios, then the
work was repeated; {len(sweep.points) - len(sweep.failed):,} recovered{failed}. One square is one point, in the order
of the calls: pale before the request leaves the process, full after the answer has arrived.</p>
{_key(sweep)}
<div class="points">{"".join(_strip(name, results) for name, results in by_scenario.items())}</div>
{"".join(_details(name, results) for name, results in by_scenario.items())}
<p class="soft">{html.escape(f"{sweep.command}, {sweep.started_at}: {versions}")}</p>
"""


def _key(sweep: SweepResult) -> str:
    counts = Counter(_parts(result)[0] for result in sweep.points)
    marks = (
        f'<span><i style="background: var(--{library})"></i>{library} {counts[library]}</span>'
        for library in LIBRARIES
        if counts[library]
    )
    return f'<div class="key">{"".join(marks)}</div>'


def _strip(scenario: str, results: Sequence[PointResult]) -> str:
    squares = "".join(_square(result) for result in results)
    said = f"{len(results)} points of {scenario}, {_recovered(results)} recovered"
    return (
        f"<span><b>{html.escape(scenario)}</b> <small>{len(results)}</small></span>"
        f'<div role="img" aria-label="{html.escape(said)}">{squares}</div>'
    )


def _square(result: PointResult) -> str:
    library, _, when = _parts(result)
    failed = " failed" if result.violations else ""
    title = html.escape("\n".join([result.point, *result.violations]))
    return f'<i class="{when}{failed}" style="background: var(--{library})" title="{title}"></i>'


def _details(scenario: str, results: Sequence[PointResult]) -> str:
    sites: defaultdict[str, list[PointResult]] = defaultdict(list)
    for result in results:
        library, place, _ = _parts(result)
        sites[f"{library} {place.replace('.', BREAK + '.')}"].append(result)
    rows = [(site, str(len(found)), str(_recovered(found))) for site, found in sites.items()]
    wrong = "".join(
        f'<p class="bad">{html.escape(f"{result.point}: {violation}")}</p>'
        for result in results
        for violation in result.violations
    )
    return (
        f"<details{' open' if wrong else ''}><summary>{html.escape(scenario)} <span>{len(sites)} call sites, "
        f"{_recovered(results)} of {len(results)} points recovered</span></summary>{wrong}"
        f"{table(('library and call site', 'points', 'recovered'), rows)}</details>"
    )


def _recovered(results: Sequence[PointResult]) -> int:
    return sum(not result.violations for result in results)


def _parts(result: PointResult) -> tuple[str, str, str]:
    """Return the library, the place in our code, and whether the process died before or after the call."""
    library, place, _, when = result.point.split()
    return library, place.removeprefix("app."), when
