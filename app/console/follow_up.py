"""Follow what an operator did to an order to its end, in one line."""

from itertools import groupby

from app.console.story import ATTEMPTED, DONE, name_call, name_event, name_waited_for
from app.operations.audit import FAILED, NOTHING_MATCHED
from app.operations.sagas import ActionOutcome
from app.operations.timeline import TimelineAnswer, TimelineEntry
from app.orders.model import FINAL
from app.saga.steps import Action
from app.values import immutable

ACTION = "act-"  # how the ids of actions on the order begin
HEAD, TAIL = 3, 6  # of a longer chain, these links are shown
STEPS = {
    "event-consumed": "event consumed",
    "saga-started": "saga started",
    "compensation-started": "starts to undo",
}
UNCHANGED = {  # by the outcome of an action that changed nothing
    ActionOutcome.DUE_ALREADY: "it was due already",
    ActionOutcome.UNDER_WAY: "an attempt was under way",
    ActionOutcome.TURNED_BEFORE: "it was being undone already",
    ActionOutcome.ENDED_BEFORE: "it had ended already",
    ActionOutcome.REFUSED: "it had ended, or not started",
    NOTHING_MATCHED: "no message matched",
}


@immutable
class Event:
    """What happened, with its time. `by`: who asked for it, and why."""

    text: str
    at: str | None = None
    by: str | None = None


def follow(story: TimelineAnswer) -> list[Event]:
    """Return the last action of an operator on this order, and what followed it. Empty: there was none."""
    happened = [entry for entry in story.entries if entry.at is not None]
    acts = [place for place, entry in enumerate(happened) if entry.id.startswith(ACTION)]
    if not acts:
        return []
    act, later = happened[acts[-1]], happened[acts[-1] + 1 :]
    chain = [Event(f"{act.event} asked", act.at, act.detail)]
    if act.outcome in UNCHANGED:
        return [*chain, Event(f"nothing was changed: {UNCHANGED[act.outcome]}")]
    if act.outcome is not None and act.outcome.startswith(FAILED):
        return [*chain, Event(f"{act.outcome}, nothing is known to have changed")]
    end = next((place for place, entry in enumerate(later, 1) if entry.source == "order"), None)
    named = [(text, entry) for entry in later[:end] if (text := _name(entry))]
    for text, group in groupby(named, lambda pair: pair[0]):
        entries = [entry for _, entry in group]
        chain.append(Event(text if len(entries) == 1 else f"{text} × {len(entries)}", entries[-1].at))
    if story.status not in FINAL:
        stuck = story.why_stuck
        chain.append(Event("under way" if stuck is None else f"waits for {name_waited_for(stuck.waiting_for)}"))
    return chain if len(chain) <= HEAD + TAIL + 1 else [*chain[:HEAD], Event("…"), *chain[-TAIL:]]


def _name(entry: TimelineEntry) -> str | None:
    """Return the text of an entry; None: the entry is left out."""
    if entry.step:
        return None if entry.outcome == ATTEMPTED else _name_answer(entry)
    if entry.source == "order":
        return entry.outcome
    if entry.event == "event-published":
        return f"{name_event(entry)} published"
    return STEPS.get(entry.event)


def _name_answer(entry: TimelineEntry) -> str:
    if entry.outcome != DONE:
        return f"{name_call(entry)} failed"
    return f"{entry.step} {'undone' if entry.event == Action.UNDO else 'done'}"
