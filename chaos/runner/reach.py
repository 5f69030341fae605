"""Which dangerous states the run has met. A fault run that never came near the danger proves nothing."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load import Observed

# What faults count themselves, in `System.met`.
COMMITS_WAITED = "commits waited for the standby"
ORDERS_LOST = "a failover lost orders that were not acknowledged"


@dataclass(frozen=True)
class Evidence:
    """What the states are recognised by: log events, ledger entries, responses, orders, and what faults saw."""

    log_events: Counter[str]
    ledger_outcomes: Counter[str]
    responses: Counter[str]
    reasons: Counter[str]
    met: Counter[str]


@dataclass(frozen=True)
class Reached:
    """A state and how often it was met."""

    state: str
    count: int


# state: (where it is seen, the name there)
STATES: Mapping[str, tuple[str, str]] = {
    "the answer to a COMMIT was lost, and the second attempt decided": ("log_events", "commit.unknown"),
    "a runner lost its lease, and its write was refused": ("log_events", "saga.lease_lost"),
    "a relay lost its lease, and its late record changed nothing": ("log_events", "relay.lease_lost"),
    "a partner's circuit opened": ("log_events", "partner.circuit"),
    "a message was lost after its confirm, and sent again": ("log_events", "janitor.resent"),
    "an unreadable message became a dead letter": ("log_events", "consumer.dead_lettered"),
    "the broker refused or returned a message": ("log_events", "relay.refused"),
    "a consumer waited for Postgres": ("log_events", "consumer.waiting"),
    "a loop paused, because a dependency was down": ("log_events", "loop.paused"),
    "requests continued without Redis": ("log_events", "redis.out"),
    "a partner got a call again, and replayed its answer": ("ledger_outcomes", "replayed"),
    "a late call met the tombstone of its undo": ("ledger_outcomes", "undone"),
    "an undo found nothing to undo": ("ledger_outcomes", "nothing-to-undo"),
    "a client got a 503": ("responses", "503"),
    "a client got no answer": ("responses", "no answer"),
    "a client hung up, and sent again": ("responses", "hung up"),
    "an order ran out of time, and was undone": ("reasons", "timed-out"),
    "a partner refused": ("reasons", "card-declined"),
    "a COMMIT waited for the standby": ("met", COMMITS_WAITED),
    "a failover lost rows that the standby had not confirmed": ("met", ORDERS_LOST),
}


FAILED_REQUEST = "http.failed"  # the log event of a request that got a 500, or would have


def count_events(logs: Iterable[Path]) -> Counter[str]:
    """Return how often each event was logged."""
    events: Counter[str] = Counter()
    for log in logs:
        with log.open(errors="replace") as lines:
            events.update(_event_of(line) for line in lines)
    return events


def collect(logs: Iterable[Path], ledger: Iterable[Mapping[str, Any]], seen: Observed, met: Counter[str]) -> Evidence:
    """Gather the evidence of a run."""
    return Evidence(
        log_events=count_events(logs),
        ledger_outcomes=Counter(str(entry["outcome"]) for entry in ledger),
        responses=seen.histories.outcomes(),
        reasons=Counter(str(order["status_reason"]) for order in seen.orders.values()),
        met=met,
    )


def _event_of(line: str) -> str:
    try:
        return str(json.loads(line)["event"])
    except (ValueError, KeyError, TypeError):  # a traceback, or a line that a kill interrupted
        return ""


def reached(evidence: Evidence) -> list[Reached]:
    """Return how often each state was met."""
    return [Reached(state, getattr(evidence, where)[name]) for state, (where, name) in STATES.items()]
