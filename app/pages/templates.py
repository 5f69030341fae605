"""Render pages and fragments with Jinja2, and answer with them under a policy that allows nothing from elsewhere."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from starlette.responses import Response

from app.pages.assets import Assets

SHARED = "app.pages"
LIVE = "live_"  # how the blocks of fragments begin

# No script and no style in the pages themselves, so text that is shown can never act.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; img-src 'self' data:"
)
SHORT_SECONDS = 9.95  # below, a fraction of a second matters
UNITS = ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
# Under `no-referrer`, the policy of all other responses, browsers send forms with `Origin: null` (Fetch, section 3.2).
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store", "Referrer-Policy": "same-origin"}


class Templates:
    """The templates of the package `room`, and the shared ones. `names`: what every template may use besides."""

    def __init__(self, room: str, assets: Assets, **names: Any) -> None:
        loader = ChoiceLoader([PackageLoader(room), PackageLoader(SHARED)])
        self._environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._environment.filters.update(clock=clock, number=number, duration=duration)
        self._environment.globals.update(asset=assets.url, **names)
        # Macros of `ui.html`, for all templates: a fragment is rendered alone, without the imports of its page.
        self._environment.globals["ui"] = self._environment.get_template("ui.html").module

    def page(self, name: str, context: Mapping[str, Any], status: int = 200) -> Response:
        """Answer with a page."""
        text = self._environment.get_template(name).render(context)
        return Response(text, status, HEADERS, media_type="text/html")

    def fragments(self, name: str, context: Mapping[str, Any]) -> dict[str, str]:
        """Return the HTML of each fragment of a page, by the id of its element."""
        template = self._environment.get_template(name)
        return {
            block.removeprefix(LIVE).replace("_", "-"): _render_block(template, block, context)
            for block in template.blocks
            if block.startswith(LIVE)
        }


def _render_block(template: Template, block: str, context: Mapping[str, Any]) -> str:
    return "".join(template.blocks[block](template.new_context(dict(context))))


def clock(instant: str | datetime) -> str:
    """Return the time of day in UTC, with the date unless it is today: `14:02:07`, `11-21 14:02:07`."""
    moment = datetime.fromisoformat(instant) if isinstance(instant, str) else instant
    moment = moment.astimezone(UTC)
    now = datetime.now(UTC)
    if moment.date() == now.date():
        return f"{moment:%H:%M:%S}"
    return f"{moment:%m-%d %H:%M:%S}" if moment.year == now.year else f"{moment:%Y-%m-%d %H:%M:%S}"


def number(value: float) -> str:
    """Return a count with a space between thousands: `12 400`."""
    return f"{value:,.0f}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Return how long something took or takes, with two units at most: `12 ms`, `3.4 s`, `5 min 20 s`, `3 h 10 min`."""
    if seconds < SHORT_SECONDS:
        return f"{seconds * 1000:.0f} ms" if round(seconds, 3) < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, small_unit in UNITS:
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"
