"""What the buttons do. Each says what it does and what to expect, and records an event."""

import signal
from collections.abc import Sequence

from app.demo.children import Child, ChildState
from app.demo.playground.customers import MAX_ORDERS, Customers
from app.demo.playground.events import Events
from app.demo.playground.partners import Partners, Rule
from app.errors import MalformedRequest
from app.values import immutable

FREEZE_SECONDS = 10.0
LOST_SECONDS = 5.0
SLOW_SECONDS = 2.0
REPEATS = 20


@immutable
class Breakage:
    """Something to break. `does`: what happens then; `expect`: what to see. `rules`: those of a partner's fault.

    `expect` is a format of the demo's `settings`.
    """

    name: str
    label: str
    does: str
    expect: str
    rules: Sequence[Rule] = ()


KILL = Breakage(
    "kill",
    "Kill the service",
    "kill -9, in the middle of whatever it does. It starts again by itself.",
    "When it is back, orders are taken again. After {settings.saga_lease_seconds:g} s the leases of the dead "
    "process end, and its orders go on.",
)
FREEZE = Breakage(
    "freeze",
    f"Freeze it for {FREEZE_SECONDS:g} s",
    "The process stops (SIGSTOP), as in a long pause of its machine, and then continues.",
    "Nothing answers. Then it goes on where it was, and nothing is charged twice.",
)
LOSE_POSTGRES = Breakage(
    "lose-postgres",
    f"Lose PostgreSQL for {LOST_SECONDS:g} s",
    "The database crashes, and is started again after that time.",
    "New orders get an honest 503 and are sent again with their keys. None is lost, none is placed twice.",
)
PROCESS_FAULTS = (KILL, FREEZE, LOSE_POSTGRES)
PARTNER_FAULTS = (
    Breakage(
        "decline",
        "Decline the next card",
        "The payment partner refuses one charge.",
        "The next order ends rejected, and its stock is free again.",
        [{"target": "payment.charge", "kind": "refuse", "times": 1}],
    ),
    Breakage(
        "lose-answer",
        "Time out after charging",
        "The next card is charged, but the answer never arrives.",
        "The order waits for {settings.partner_timeout_seconds:g} s, asks again with the same key, and the card is "
        "charged once.",
        [{"target": "payment.charge", "kind": "timeout_after", "times": 1}],
    ),
    Breakage(
        "payment-down",
        "Payment partner down",
        "It answers 503 to every call, until you bring it back.",
        "Orders are still taken, and wait as pending. When it is back, all go on within half a minute.",
        [{"target": target, "kind": "unavailable"} for target in ("payment.charge", "payment.refund")],
    ),
    Breakage(
        "shipping-slow",
        "Slow shipping partner",
        f"Every shipment takes {SLOW_SECONDS:g} s, until you bring it back.",
        "Orders are taken as fast as before; they only end later.",
        [{"target": "shipping.create", "kind": "slow", "delay_seconds": SLOW_SECONDS}],
    ),
)


class Actions:
    """Breaks things and repairs them, and places orders."""

    def __init__(
        self, service: Child, database: Child, partners: Partners, customers: Customers, events: Events
    ) -> None:
        self._service = service
        self._database = database
        self._partners = partners
        self._customers = customers
        self._events = events

    async def run(self, button: str) -> None:
        """Do what a button says: `place:10`, `one-key`, `break:kill`, `stop:payment-down`, `repair`.

        Raises MalformedRequest, TooManyWaiting, PartnerUnavailable.
        """
        verb, _, subject = button.partition(":")
        match verb:
            case "place":
                await self._customers.place(_parse_number(subject))
            case "one-key":
                await self._customers.send_one_key(REPEATS)
            case "break":
                await self._break(_find(subject))
            case "stop":
                breakage = _find(subject)
                await self._partners.remove_faults(breakage.rules)
                self._events.add(f"you ended “{breakage.label}”")
            case "repair":
                await self._repair()
            case _:
                raise MalformedRequest("no button says this")

    async def _break(self, breakage: Breakage) -> None:
        if breakage.rules:
            await self._partners.add_faults(breakage.rules)
        elif not self._break_process(breakage):
            self._events.add(f"“{breakage.label}” did nothing: it is not running")
            return
        self._events.add(f"you chose “{breakage.label}”")

    def _break_process(self, breakage: Breakage) -> bool:
        """Return whether there was something to break."""
        child = self._database if breakage is LOSE_POSTGRES else self._service
        if child.pid is None or (breakage is FREEZE and child.state is not ChildState.RUNNING):
            return False
        if breakage is FREEZE:
            child.freeze(FREEZE_SECONDS)
        elif breakage is LOSE_POSTGRES:
            child.kill(signal.SIGQUIT, LOST_SECONDS)  # PostgreSQL's "immediate shutdown": it recovers as from a crash
        else:
            child.kill()
        return True

    async def _repair(self) -> None:
        for child in (self._service, self._database):
            child.recover()
        await self._partners.clear_faults()
        self._events.add("you repaired everything")


def _find(name: str) -> Breakage:
    for breakage in (*PROCESS_FAULTS, *PARTNER_FAULTS):
        if breakage.name == name:
            return breakage
    raise MalformedRequest("there is nothing of this name to break")


def _parse_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_ORDERS):
        raise MalformedRequest(f"place 1 to {MAX_ORDERS} orders at a time")
    return int(text)
