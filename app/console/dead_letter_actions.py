"""Replay or purge one dead letter, or all that match: a dry run, then a limited number at a time, with the progress.

Each form is one scan, recorded with its reason. Without JavaScript, the operator sends one form after the other; with
it, `bulk.js` can, until all are done, something fails, or the operator stops it. It is safe to stop at any point.
"""

from collections import Counter
from http import HTTPStatus

from fastapi import HTTPException, Response

from app.api.ops import dlq
from app.console.dead_letters import ADDRESS, DONE, LetterFilter
from app.console.route import Change, ChangeRequest, OperatorPage, console_router, go_to
from app.errors import DeadLettersBusy, NotOffered, Unavailable, ValidationFailed
from app.operations.dead_letters import DeadLetterAction, Finding, Summary, as_uuid
from app.values import immutable

router = console_router()

LISTED = 10  # the most frequent reasons
MAX_LETTERS = 10**9  # a count in an address is no larger


@immutable
class Progress:
    """How far a bulk action has come. `left`: how many it has still to do, by the dry run."""

    done: int
    left: int

    def after(self, summary: Summary, limit: int) -> "Progress":
        """Return the progress after a scan for `limit` letters. It was the last if none matched, or it saw all."""
        is_last = not summary.matched or (summary.matched < limit and summary.looked_at >= summary.depth)
        return Progress(self.done + summary.matched, 0 if is_last else max(0, self.left - summary.matched))


class DryRun:
    """Counts what a scan finds: by the effect of a replay, by reason."""

    def __init__(self) -> None:
        self.effects: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def add(self, finding: Finding) -> None:
        """Count a dead letter."""
        self.effects[finding.replay_effect] += 1
        self._reasons[finding.letter.reason] += 1

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """The most frequent reasons, each with its number."""
        return self._reasons.most_common(LISTED)


@router.get(ADDRESS + "/{action}")
async def show_bulk(page: OperatorPage, action: str) -> Response:
    """Show what an action on all that match would do or, between two forms, its progress."""
    query = page.request.query_params
    wanted = LetterFilter.read(page.ops, lambda name: query.get(name, ""))
    meant, dry_run, summary = _parse_action(action), DryRun(), None
    if "done" in query:
        progress = Progress(_count(query["done"], MAX_LETTERS), _count(query.get("left", ""), MAX_LETTERS))
    else:
        summary = await wanted.letters.scan(meant, wanted.select(), dry_run.add)
        is_everything = not wanted.since and wanted.id is None
        progress = Progress(0, summary.depth if is_everything else summary.matched)
    return page.answer(
        "dead_letters_bulk.html",
        action=meant.value,
        done_text=DONE[meant],
        wanted=wanted,
        progress=progress,
        summary=summary,
        dry_run=dry_run,
        limit=_count(query.get("limit", str(dlq.DEFAULT_LETTERS)), dlq.MAX_LETTERS),
        max_limit=dlq.MAX_LETTERS,
        reason=query.get("reason", ""),
    )


@router.post(ADDRESS + "/{action}")
async def act(change: Change, action: str) -> Response:
    """Do it to one dead letter and show its order, or to the next ones that match and show the progress."""
    meant = _parse_action(action)
    wanted = LetterFilter.read(change.ops, change.field)
    if wanted.id is not None:
        summary, findings = await _scan(change, meant, wanted, 1)
        return go_to(_after_one(meant, wanted, summary, findings))
    at_a_time = _count(change.field("limit"), dlq.MAX_LETTERS) or 1
    progress = Progress(_count(change.field("done"), MAX_LETTERS), _count(change.field("left"), MAX_LETTERS))
    limit = min(at_a_time, progress.left or at_a_time)
    summary, _ = await _scan(change, meant, wanted, limit)
    progress = progress.after(summary, limit)
    return go_to(
        wanted.address(
            f"/{meant}", done=progress.done, left=progress.left, limit=at_a_time, reason=change.field("reason")
        )
    )


async def _scan(
    change: ChangeRequest, action: DeadLetterAction, wanted: LetterFilter, limit: int
) -> tuple[Summary, list[Finding]]:
    findings: list[Finding] = []
    actor = change.actor(change.reason())
    try:
        summary = await dlq.act(change.ops, wanted.letters, action, wanted.select(limit), actor, findings.append)
    except DeadLettersBusy as error:
        raise DeadLettersBusy(f"{error}. Nothing was changed") from error
    except Unavailable as error:
        raise type(error)(
            str(error),
            public=f"the service cannot do this right now. Before that, {len(findings)} of at most {limit} were surely "
            f"{DONE[action]}; the others may be, or are dead letters as before. It is safe to repeat it: no message "
            "takes effect twice",
        ) from error
    return summary, findings


def _after_one(action: DeadLetterAction, wanted: LetterFilter, summary: Summary, findings: list[Finding]) -> str:
    """Return the address of the page that shows the effect: a replayed message is followed on the page of its order."""
    order_id = wanted.select().order_id
    if findings:
        order_id = as_uuid(findings[0].letter.subject)
    elif not summary.from_outbox:
        raise HTTPException(
            HTTPStatus.NOT_FOUND, f"no dead letter has the id {wanted.id}: it may have been replayed or purged"
        )
    if action is DeadLetterAction.REPLAY and order_id is not None:
        return f"/console/orders/{order_id}"
    return LetterFilter(wanted.letters, wanted.queue, None, "").address(done=action.value)


def _parse_action(name: str) -> DeadLetterAction:
    actions = {action.value: action for action in DONE}
    if name not in actions:
        raise NotOffered("Not Found")
    return actions[name]


def _count(text: str, at_most: int) -> int:
    """Parse a count. Raises ValidationFailed."""
    if not text.isascii() or not text.isdigit() or len(text) > len(str(at_most)) or int(text) > at_most:
        raise ValidationFailed(f"a number must be whole, from 0 to {at_most}")
    return int(text)
