"""Dead letters: why each is one, its state in the inbox, and what a replay would do.

For a look at its dead letters, RabbitMQ delivers all of them and takes them back, and meanwhile no other look can
begin. So the page has those of its loading, says when that was, and links to itself. Live is what Postgres knows: how
many messages the inbox records as dead.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import structlog
from fastapi import Response

from app.api.ops.deps import OpsDeps
from app.api.params import parse_letter_id, parse_seconds
from app.console.route import OperatorPage, console_router
from app.errors import BrokerUnavailable, DeadLettersBusy, ValidationFailed
from app.operations import dead_letter_views, saga_views
from app.operations.dead_letter_views import DeadLetterView
from app.operations.dead_letters import DeadLetterAction, DeadLetters, Finding, Selection, Summary, as_uuid
from app.operations.maintenance.lost_letters import ADVICE
from app.orders.model import rfc3339
from app.values import immutable

log = structlog.get_logger(__name__)
router = console_router()

ADDRESS = "/console/dead-letters"
SHOWN = 50
PURGED_SHOWN = 20
AGES = ("15m", "1h", "12h", "1d", "7d")  # offered by the form; the address may have any other
DONE = {DeadLetterAction.REPLAY: "replayed", DeadLetterAction.PURGE: "purged"}


@immutable
class LetterFilter:
    """Which dead letters of a queue are meant. `queue`, `since`: as they are written; empty: the first, any time."""

    letters: DeadLetters
    queue: str
    id: str | None
    since: str

    @classmethod
    def read(cls, deps: OpsDeps, field: Callable[[str], str]) -> "LetterFilter":
        """Read it from the fields of a form or a query. An empty one is no condition. Raises ValidationFailed."""
        queue, letter_id, since = (field(name).strip() for name in ("queue", "id", "since"))
        letters = deps.dead_letters_of(queue or None, "/queue")
        try:
            found = cls(letters, queue, parse_letter_id(letter_id) if letter_id else None, since)
            found.select()
        except ValueError as error:
            raise ValidationFailed(f"the filter cannot be read: a value {error}") from error
        return found

    def select(self, limit: int | None = None) -> Selection:
        """Return the selection of up to `limit` letters."""
        return Selection(self.id, parse_seconds(self.since) if self.since else None, limit)

    def fields(self) -> Mapping[str, str]:
        """Return the conditions as fields of a form or a query."""
        fields = {"queue": self.queue, "id": self.id or "", "since": self.since}
        return {name: value for name, value in fields.items() if value}

    def address(self, path: str = "", **more: object) -> str:
        """Return the address of a page with these conditions. `path`: below the page of the dead letters."""
        query = urlencode({**self.fields(), **more})
        return f"{ADDRESS}{path}" + (f"?{query}" if query else "")


@immutable
class Letters:
    """What a look found. `at`: when. `problem`: why it failed; empty: it did not."""

    at: str
    summary: Summary
    letters: list[DeadLetterView]
    problem: str = ""

    @property
    def orders(self) -> list[str | None]:
        """The order of each letter; None: it has none. The subject of a message may be any text, an order's id not."""
        return [letter.order_id if as_uuid(letter.order_id) else None for letter in self.letters]

    @property
    def are_all(self) -> bool:
        """Whether every dead letter was looked at."""
        return self.summary.looked_at >= self.summary.depth


@router.get(ADDRESS)
async def show(page: OperatorPage) -> Response:
    """Show the dead letters as they are now."""
    query = page.request.query_params
    wanted = LetterFilter.read(page.ops, lambda name: query.get(name, ""))
    consumer = wanted.letters.queue.consumer

    async def read() -> Mapping[str, Any]:
        recorded = await dead_letter_views.read_recorded(page.ops.pool, consumer)
        return {"recorded": recorded, "counted": dead_letter_views.COUNTED}

    if page.wants_stream:
        return await page.show("dead_letters.html", read)
    return await page.show(
        "dead_letters.html",
        read,
        wanted=wanted,
        found=await _look(wanted, is_asked="look" in query),
        purged=await saga_views.read_purged(page.ops.pool, consumer, PURGED_SHOWN),
        queues=list(page.ops.dead_letters),
        ages=AGES if wanted.since in {"", *AGES} else (*AGES, wanted.since),
        done={action.value: text for action, text in DONE.items()}.get(query.get("done", ""), ""),
    )


async def _look(wanted: LetterFilter, *, is_asked: bool) -> Letters:
    """Do what a replay would do, without doing it. `is_asked`: also if looking often loses letters."""
    findings: list[Finding] = []
    summary, problem = Summary(0), ""
    try:
        if not is_asked and not await wanted.letters.source.may_be_scanned_often():
            problem = f"RabbitMQ drops a letter that was looked at too often: {ADVICE}"
            return Letters(rfc3339(datetime.now(UTC)), summary, [], problem)
        summary = await wanted.letters.scan(DeadLetterAction.REPLAY, wanted.select(SHOWN), findings.append)
    except BrokerUnavailable as error:
        log.info("console.dead_letters_unknown", error=str(error))
        problem = "the broker cannot be reached"
    except DeadLettersBusy as error:
        problem = str(error)
    views = [] if problem else [DeadLetterView.of(finding) for finding in findings]
    return Letters(rfc3339(datetime.now(UTC)), summary, views, problem)
