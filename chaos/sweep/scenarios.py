"""What happens to an order while a process dies: what the client sends, or what an operator or the janitor does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

CHARGE_SECONDS = 0.3  # less than PARTNER_TIMEOUT_SECONDS
REASON = ("--reason", "the sweep")
JANITOR_LOOPS = "app.operations.maintenance"
RESENT = "SELECT resends > 0 FROM outbox WHERE id = $1::text::uuid"
PENDING = "SELECT status = 'pending' FROM orders WHERE id = $1::text::uuid"  # no consumer runs yet


class Before(Enum):
    """The state of an order before a command or the janitor works. Its event is published, and no consumer runs yet."""

    LOST = auto()  # the broker lost the event, an hour ago
    DEAD = auto()  # the event is a dead letter
    DEAD_LOST = auto()  # it was one an hour ago, and the broker lost it
    PURGED = auto()  # it was one, and the operator purged it
    PARKED = auto()  # the broker refused the event until its row was parked
    WAITING = auto()  # the charge failed, and the saga waits for an hour
    OLD = auto()  # orders before it have ended: their rows are past their retention, and their keys have expired


@dataclass(frozen=True)
class OrderScenario:
    """A service with all roles dies while it serves an order.

    `cancels`: its customer cancels it at once. `faults`: rules of the sandbox. `takes_over`: its key is one that has
    expired, and only the calls of its requests are points.
    """

    sku: str = "WIDGET"
    cancels: bool = False
    faults: Sequence[Mapping[str, Any]] = ()
    takes_over: bool = False


@dataclass(frozen=True)
class CommandScenario:
    """A command of an operator dies, and is given again. ORDER is the id of the order.

    `done`: SQL that is true of order $1 after the second one. `settings`: of the command. `again`: the exit codes of
    the second one. `finally_`: a command after it, without which the order would not end. `ends`: its status then.
    """

    before: Before
    args: Sequence[str]
    done: str
    settings: Mapping[str, str] = field(default_factory=dict)
    again: Sequence[int] = (0,)
    finally_: Sequence[str] = ()
    ends: str = "confirmed"


@dataclass(frozen=True)
class JanitorScenario:
    """A process with the role janitor dies in one of its loops. `done`: SQL that is true of order $1 afterwards."""

    before: Before
    loop: str
    done: str
    ends: str = "confirmed"


Scenario = OrderScenario | CommandScenario | JanitorScenario

SCENARIOS: Mapping[str, Scenario] = {
    "confirmed": OrderScenario(),
    "compensated": OrderScenario(sku="UNDELIVERABLE"),
    # The cancel comes while the charge is on its way, in every run.
    "cancelled": OrderScenario(
        cancels=True, faults=[{"target": "payment.charge", "kind": "slow", "delay_seconds": CHARGE_SECONDS}]
    ),
    "key-taken-over": OrderScenario(takes_over=True),
    "resent": JanitorScenario(Before.LOST, f"{JANITOR_LOOPS}.resender", RESENT),
    "lost-dead-letter": JanitorScenario(Before.DEAD_LOST, f"{JANITOR_LOOPS}.lost_letters", RESENT),
    # The janitor's loop and this command delete with the same code; the command has an end.
    "pruned": CommandScenario(
        Before.OLD,
        ("prune",),
        """
        SELECT NOT EXISTS (SELECT FROM idempotency_keys WHERE expires_at <= clock_timestamp())
            AND EXISTS (SELECT FROM outbox WHERE id = $1::text::uuid)
        """,
        {f"ORDERS_{table}_RETENTION_SECONDS": "0.001" for table in ("OUTBOX", "INBOX", "SAGA")},
    ),
    "dlq-replay": CommandScenario(Before.DEAD, ("dlq", "replay"), PENDING),
    "dlq-purge": CommandScenario(
        Before.DEAD,
        ("dlq", "purge"),
        "SELECT purged_at IS NOT NULL FROM inbox WHERE message_id = $1",
        finally_=("dlq", "replay", "--id", "ORDER"),
    ),
    "dlq-replay-id": CommandScenario(Before.PURGED, ("dlq", "replay", "--id", "ORDER"), PENDING),
    # The second requeue finds nothing to do if the first one committed.
    "outbox-requeue": CommandScenario(
        Before.PARKED,
        ("outbox", "requeue", "ORDER"),
        "SELECT parked_at IS NULL FROM outbox WHERE id = $1::text::uuid",
        again=(0, 1),
    ),
    "saga-retry": CommandScenario(
        Before.WAITING,
        ("saga", "retry", "ORDER", *REASON),
        "SELECT next_attempt_at <= clock_timestamp() FROM sagas WHERE id = $1::text::uuid",
    ),
    "saga-compensate": CommandScenario(
        Before.WAITING,
        ("saga", "compensate", "ORDER", *REASON),
        "SELECT cancel_requested_at IS NOT NULL FROM orders WHERE id = $1::text::uuid",
        ends="rejected",
    ),
}
