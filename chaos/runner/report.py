"""The report of a run: text for the terminal, and one self-contained HTML page with pictures (no network)."""

import html
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import load
from chaos.runner import LIVENESS_SECONDS, crash_points
from chaos.runner.tables import table
from chaos.runner.verdict import ChaosVerdict, InjectedFault

WIDTH, HEIGHT, LEFT, BOTTOM = 960, 150, 56, 18

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --paper: #ffffff; --line: #d9dee7; --band: #d9480f22;
  --a: #1c6dd0; --b: #b42318; --good: #12805c; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --paper: #14181f; --line: #2b323d;
  --band: #ff922b33; --a: #6cb2ff; --b: #ff8a80; --good: #4ad3a2; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1020px; padding: 32px 20px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 8px; }
p.soft, caption { color: var(--soft); margin: 0 0 12px; text-align: left; }
.verdict { font-size: 20px; font-weight: 650; } .good { color: var(--good); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
dl div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: 5px 10px 5px 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; font-size: 13px; } td.n, th.n { text-align: right; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
code { font-size: 13px; } p, li { overflow-wrap: anywhere; }
"""


def as_text(verdict: ChaosVerdict) -> str:
    """Return the verdict as lines for a terminal."""
    injected = Counter(fault.kind for fault in verdict.faults)
    figures = load.as_text(verdict.load).partition("\n\n")[0]  # its violations are among ours
    settled = "not in time" if verdict.settled_seconds is None else f"{verdict.settled_seconds:.0f} s"
    return "\n".join(
        [
            figures,
            f"{'faults':<18}{len(verdict.faults)} of {len(injected)} kinds",
            f"{'quiet after':<18}{settled} (limit {LIVENESS_SECONDS:.0f} s after the last fault)",
            f"{'states reached':<18}{sum(bool(row.count) for row in verdict.reached)} of {len(verdict.reached)}",
            "",
            *(f"VIOLATED: {line}" for line in verdict.violations),
            f"Verdict: {'VIOLATED' if verdict.violations else 'HOLDS'}",
        ]
    )


def as_html(verdict: ChaosVerdict) -> str:
    """Return the page."""
    good = not verdict.violations
    mark = "Every promise held" if good else f"{len(verdict.violations)} violations"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Orders: load with induced failures</title><style>{STYLE}{crash_points.STYLE}</style></head><body>
<h1>Load with induced failures</h1>
<p class="soft">{verdict.orders:,} keyed orders from impatient clients, {len(verdict.faults)} faults of
{len({fault.kind for fault in verdict.faults})} kinds, seed {verdict.seed}. The shaded bands are faults.</p>
<p class="verdict {"good" if good else "bad"}">{mark}</p>
{_list(verdict.violations)}
{_figures(verdict)}
<h2>Orders acknowledged per second</h2>
{_chart(verdict, [("var(--a)", [float(count) for count in verdict.series.acknowledged])])}
<h2>POST to 201: median and 99th percentile, in milliseconds</h2>
{_chart(verdict, [("var(--a)", _ms(verdict.series.p50_seconds)), ("var(--b)", _ms(verdict.series.p99_seconds))])}
<h2>Backlog: events in the outbox, and unfinished orders</h2>
{_chart(verdict, [("var(--a)", _numbers(verdict.series.events)), ("var(--b)", _numbers(verdict.series.orders))])}
<p class="soft">Blue: events. Red: orders. A gap: Postgres was down.</p>
<h2>What was promised, and what was found</h2>
{_promises(verdict)}
<h2>Faults</h2>
{_faults(verdict.faults)}
<h2>Dangerous states that the run met</h2>
{table(("state", "times"), [(row.state, f"{row.count:,}") for row in verdict.reached])}
{"" if verdict.sweep is None else crash_points.as_html(verdict.sweep)}
{_bugs(verdict)}
<h2>How to run it again</h2>
<p><code>{html.escape(verdict.command)}</code></p>
<p class="soft">{html.escape(", ".join(f"{name} {version}" for name, version in verdict.versions.items()))}</p>
</body></html>
"""


def _figures(verdict: ChaosVerdict) -> str:
    run = verdict.load
    settled = "–" if verdict.settled_seconds is None else f"{verdict.settled_seconds:.0f} s"
    figures = {
        "acknowledged": f"{run.acknowledged:,}",
        "duplicates": f"{run.duplicates:,}",
        "lost": f"{run.lost:,}",
        "charged − refunded − due": f"{(run.charged_minor - run.refunded_minor - run.due_minor) / 100:,.2f}",
        "quiet after the last fault": settled,
        "requests": f"{run.requests:,}",
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()) + "</dl>"


def _promises(verdict: ChaosVerdict) -> str:
    broken = {violation.promise: violation.count for violation in verdict.load.violations}
    rows = [(promise, f"{broken[promise]:,} violations" if promise in broken else "holds") for promise in load.PROMISES]
    checker = f"{len(verdict.checker):,} violations" if verdict.checker else "holds"
    return table(
        ("promise", "found"),
        [
            *rows,
            ("invariants I1 to I7, by tables and ledger, judged independently", checker),
            *((f"{invariant}, by orders verify", said) for invariant, said in verdict.verified.items()),
        ],
    )


def _faults(faults: Sequence[InjectedFault]) -> str:
    by_kind: defaultdict[str, list[InjectedFault]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    rows = []
    for kind, found in sorted(by_kind.items()):
        recovered = sorted(fault.recovered_seconds for fault in found if fault.recovered_seconds is not None)
        longest = f"{recovered[-1]:.1f} s" if recovered else "–"
        rows.append((kind, str(len(found)), f"{max(f.to_second - f.from_second for f in found):.1f} s", longest))
    return table(("fault", "times", "longest", "longest until half of the usual 201s per second"), rows)


def _bugs(verdict: ChaosVerdict) -> str:
    if not verdict.bugs:
        return ""
    rows = [
        (f"{catch.invariant}: {catch.bug}", catch.caught_by or catch.problem or "not caught") for catch in verdict.bugs
    ]
    return "<h2>Planted bugs, and the tests that caught them</h2>" + table(("bug", "caught by"), rows)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _ms(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else value * 1000 for value in values]


def _numbers(values: Sequence[int | None]) -> list[float | None]:
    return [None if value is None else float(value) for value in values]


def _chart(verdict: ChaosVerdict, lines: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    seconds = max(1, *(len(values) for _, values in lines))
    top = max((value for _, values in lines for value in values if value is not None), default=1.0) or 1.0

    def x(second: float) -> float:
        return LEFT + second / seconds * (WIDTH - LEFT)

    def y(value: float) -> float:
        return (HEIGHT - BOTTOM) * (1 - value / top) + 2

    bands = "".join(
        f'<rect x="{x(fault.from_second):.1f}" y="0" height="{HEIGHT - BOTTOM + 2}" fill="var(--band)"'
        f' width="{max(1.0, x(fault.to_second) - x(fault.from_second)):.1f}">'
        f"<title>{html.escape(fault.kind)}</title></rect>"
        for fault in verdict.faults
    )
    paths = "".join(
        f'<path d="{_path(values, x, y)}" fill="none" stroke="{color}" stroke-width="1.5"/>' for color, values in lines
    )
    marks = "".join(
        f'<text x="{x(second):.0f}" y="{HEIGHT - 2}">{second} s</text>'
        for second in range(0, seconds, max(10, seconds // 80 * 10))
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{bands}'
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y(0):.0f}" y2="{y(0):.0f}" stroke="var(--line)"/>'
        f'<text x="0" y="12">{top:,.0f}</text><text x="0" y="{y(0):.0f}">0</text>{paths}{marks}</svg>'
    )


def _path(values: Sequence[float | None], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    steps, pen = [], "M"
    for second, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        steps.append(f"{pen}{x(second):.1f},{y(value):.1f}")
        pen = "L"
    return " ".join(steps)
