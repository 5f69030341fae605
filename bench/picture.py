"""The pictures: how many times as fast as each floor and peer the service is, and where its processor time goes."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from xml.sax.saxutils import escape

from bench.rounds import Comparison, Ratio

WIDTH, LINE, TOP = 760, 26, 54
FIRST, LAST = 300, 680  # where the scale of the ratios begins and ends
SHARES, PERCENT = 240, 8.0  # where the bars of the shares begin, and the pixels of a percent
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #24292f }
    .title { font-weight: 600; font-size: 15px } .small { fill: #57606a; font-size: 11px }
    .faster { fill: #2a7f62 } .slower { fill: #8a6d3b } .share { fill: #3b6ea8 }
    .spread { stroke: #24292f; stroke-width: 1.5 }
    .tick { stroke: #d0d7de } .one { stroke: #57606a } .page { fill: #fff }
    @media (prefers-color-scheme: dark) {
        text { fill: #e6edf3 } .small { fill: #9198a1 } .faster { fill: #3fb68b } .slower { fill: #c69a4c }
        .share { fill: #6ca0dc } .spread { stroke: #e6edf3 } .tick { stroke: #30363d } .one { stroke: #9198a1 }
        .page { fill: #0d1117 }
    }
"""


def of_ratios(results: Mapping[str, Comparison]) -> str:
    """Return the picture of all ratios, on a logarithmic scale.

    A bar goes from 1 to the median, and a line from the lowest to the highest.
    """
    bars = [(f"{name} ÷ {other}", found) for name, row in results.items() for other, found in row.ratios.items()]
    height, ticks = TOP + LINE * len(bars) + 34, _ticks(bars)
    lines = ['<text class="title" x="16" y="26">Rate of the service ÷ rate of …</text>', *_scale(height, ticks)]
    for number, bar in enumerate(bars):
        lines.extend(_bar(TOP + LINE * number, *bar, ticks))
    return _page("How many times as fast as each floor and peer the service is", height, lines)


def of_profile(rows: Mapping[str, Counter[str]]) -> str:
    """Return the picture of a profile: for each row a bar for each part, in percent of the row's samples."""
    lines, top = [], TOP
    for row, parts in rows.items():
        lines.append(f'<text class="title" x="16" y="{top - 10}">{escape(row)}: share of the processor time</text>')
        for part, samples in parts.most_common():
            share = 100 * samples / parts.total()
            lines.append(f'<text x="16" y="{top + 17}">{escape(part)}</text>')
            lines.append(f'<rect class="share" x="{SHARES}" y="{top + 5}" width="{share * PERCENT:.1f}" height="16"/>')
            lines.append(f'<text x="{SHARES + share * PERCENT + 8:.1f}" y="{top + 17}">{share:.0f} %</text>')
            top += LINE
        top += TOP
    return _page("Where the processor time of the service goes", top - TOP + 16, lines)


def _page(title: str, height: int, lines: Iterable[str]) -> str:
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height}"/>',
            *lines,
            "</svg>\n",
        )
    )


def _ticks(bars: list[tuple[str, Ratio]]) -> list[float]:
    """Return the ticks that the bars need; 1 is always one."""
    low = min([1.0, *(found.low for _, found in bars)])
    high = max([1.0, *(found.high for _, found in bars)])
    first = max((at for at, tick in enumerate(TICKS) if tick <= low), default=0)
    last = min((at for at, tick in enumerate(TICKS) if tick >= high), default=len(TICKS) - 1)
    return list(TICKS[first : last + 1]) if first < last else [0.5, 1.0, 2.0]


def _x(value: float, ticks: list[float]) -> float:
    share = math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
    return round(FIRST + min(max(share, 0.0), 1.0) * (LAST - FIRST), 1)


def _scale(height: int, ticks: list[float]) -> Iterator[str]:
    for tick in ticks:
        at, kind = _x(tick, ticks), "one" if tick == 1 else "tick"
        yield f'<line class="{kind}" x1="{at}" x2="{at}" y1="{TOP - 8}" y2="{height - 28}"/>'
        yield f'<text class="small" x="{at}" y="{height - 12}" text-anchor="middle">{tick:g} x</text>'


def _bar(top: int, label: str, found: Ratio, ticks: list[float]) -> Iterator[str]:
    one, middle, low, high = (_x(value, ticks) for value in (1.0, found.median, found.low, found.high))
    kind, line = ("faster" if found.median >= 1 else "slower"), top + LINE / 2
    yield f'<text x="16" y="{line + 4}">{escape(label)}</text>'
    yield f'<rect class="{kind}" x="{min(one, middle)}" y="{top + 5}" width="{abs(middle - one):.1f}" height="16"/>'
    yield f'<line class="spread" x1="{low}" x2="{high}" y1="{line}" y2="{line}"/>'
    yield f'<text x="{WIDTH - 16}" y="{line + 4}" text-anchor="end">{found.median:.2f}</text>'
