"""Check a run against the partners' own ledger, not only against the service's data.

The invariants (docs/invariants.md), once every order is final:

- I2: a key has one order and one response, byte for byte; every order that got a 201 exists;
- I3: each order has two published events, one for its placing and one for its end, with its version as their sequence;
  every published event was received, always under the same id, and in the order of an order's sequences (a repeat may
  come late);
- I4: each message took effect once: one saga per order (none if it was cancelled before its saga started; then no
  partner was called either), and nothing moved twice at any partner;
- I5: charged − refunded is the total of a confirmed order, and zero for every other; never two live charges;
- I7: stock is conserved: confirmed orders took what is sold, nothing is held, and nothing was shipped that was not sold
  and paid for.

The answer to a cancel holds too: after a 200 or 202 the order is not confirmed, after a 409 it was not cancelled.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import httpx

FREE_AT_FIRST = 1_000_000  # the sandbox's initial stock of any item
CANCEL_ACCEPTED = frozenset({httpx.codes.OK, httpx.codes.ACCEPTED})
FINAL = ("confirmed", "rejected", "cancelled")
DELTAS = {
    "payment.charge": ("charges", 1),
    "payment.refund": ("charges", -1),
    "inventory.hold": ("stock", 1),
    "inventory.release": ("stock", -1),
    "shipping.create": ("parcels", 1),
    "shipping.cancel": ("parcels", -1),
}


@dataclass(frozen=True)
class Heard:
    """One message as it arrived."""

    id: str
    type: str
    subject: str
    sequence: int


@dataclass
class Answers:
    """The responses to the callers: for each key, every distinct (location, body) of a 201.

    `cancels`: for each order, every distinct status of the responses to its cancels.
    """

    by_key: dict[str, set[tuple[str, bytes]]] = field(default_factory=dict)
    cancels: dict[str, set[int]] = field(default_factory=dict)

    def add(self, key: str, response: httpx.Response) -> None:
        """Record a 201."""
        assert response.status_code == httpx.codes.CREATED, response.text
        self.by_key.setdefault(key, set()).add((response.headers["location"], response.content))

    def add_cancel(self, order_id: str, response: httpx.Response) -> None:
        """Record the response to a cancel: 200, 202, or the 409 for "too late"."""
        assert response.status_code in CANCEL_ACCEPTED or is_too_late(response), response.text
        self.cancels.setdefault(order_id, set()).add(response.status_code)


def is_too_late(response: httpx.Response) -> bool:
    """Return whether the response to a cancel is that the order is final already."""
    return response.status_code == httpx.codes.CONFLICT and response.json()["code"] == "order-not-cancellable"


@dataclass(frozen=True)
class Facts:
    """All the data that is checked, read once."""

    orders: Mapping[str, Mapping[str, Any]]  # by id: status, total_minor, version
    lines: Mapping[str, Counter[str]]  # by order: quantity of each sku
    sagas: frozenset[str]
    events: Mapping[str, list[tuple[str, int]]]  # by order: type and sequence of each published event, in order
    published: Collection[Heard]  # as a listener must have received it
    pruned: frozenset[str]  # ids of orders whose events, inbox rows and sagas must be gone
    remembered: Collection[str]  # ids of all messages in inboxes
    unhandled: Collection[str]  # ids of `order.placed` events without an inbox row that says they took effect
    entries: list[dict[str, Any]]
    summary: Mapping[str, Mapping[str, Any]]
    stock: Mapping[str, Mapping[str, int]]


async def violations(
    database_url: str,
    sandbox: httpx.AsyncClient,
    answers: Answers | None = None,
    heard: Sequence[Heard] | None = None,
    free_at_first: Mapping[str, int] | None = None,
    pruned: Collection[str] = (),
) -> list[str]:
    """Return the violated invariants, one line each. Every order must be final.

    `heard`: the messages, in order, of a queue that was bound to everything from the start. `free_at_first`: the
    initial stock of items for which it was set. `pruned`: orders whose events, inbox rows and sagas were deleted.
    """
    facts = await _read(database_url, sandbox, pruned)
    found = [f"I6: order {id_} is {order['status']}" for id_, order in facts.orders.items() if not _ended(order)]
    for invariant in (_events, _effects, _money):
        found += invariant(facts)
    found += _stock(facts, {"OUT-OF-STOCK": 0, **(free_at_first or {})})
    if heard is not None:
        found += _heard(facts, heard)
    return [*found, *(_answers(facts, answers) if answers else ())]


async def _read(database_url: str, sandbox: httpx.AsyncClient, pruned: Collection[str]) -> Facts:
    conn = await asyncpg.connect(database_url)
    try:
        orders = {
            str(row["id"]): dict(row) for row in await conn.fetch("SELECT id, status, total_minor, version FROM orders")
        }
        lines: dict[str, Counter[str]] = {id_: Counter() for id_ in orders}
        for row in await conn.fetch("SELECT order_id, sku, quantity FROM order_lines"):
            lines[str(row["order_id"])][row["sku"]] += row["quantity"]
        remembered = [row["message_id"] for row in await conn.fetch("SELECT message_id FROM inbox")]
        sagas = [str(row["id"]) for row in await conn.fetch("SELECT id FROM sagas")]
        events: dict[str, list[tuple[str, int]]] = {id_: [] for id_ in orders}
        query = "SELECT id::text, type, subject, sequence FROM outbox WHERE published_at IS NOT NULL ORDER BY sequence"
        published = [Heard(**row) for row in await conn.fetch(query)]
        for event in published:
            events[event.subject].append((event.type, event.sequence))
        unhandled = await conn.fetch(
            """
            SELECT id FROM outbox WHERE type = 'orders.order.placed.v1' AND NOT EXISTS (
                SELECT FROM inbox WHERE message_id = outbox.id::text AND processed_at IS NOT NULL)
            """
        )
    finally:
        await conn.close()
    skus = {sku for counter in lines.values() for sku in counter}
    return Facts(
        orders=orders,
        lines=lines,
        sagas=frozenset(sagas),
        events=events,
        published=published,
        pruned=frozenset(pruned),
        remembered=remembered,
        unhandled=[str(row["id"]) for row in unhandled],
        entries=[entry async for entry in _entries(sandbox)],
        summary=(await _get(sandbox, "/ledger/summary"))["sagas"],
        stock={sku: await _get(sandbox, f"/v1/inventory/stock/{sku}") for sku in skus},
    )


async def _get(sandbox: httpx.AsyncClient, path: str, **params: Any) -> Any:
    return (await sandbox.get(path, params=params)).raise_for_status().json()


async def _entries(sandbox: httpx.AsyncClient) -> Any:
    after = 0
    while page := (await _get(sandbox, "/ledger", after=after, limit=1000))["entries"]:
        for entry in page:
            yield entry
        after = page[-1]["seq"]


def _ended(order: Mapping[str, Any]) -> bool:
    return order["status"] in FINAL


def _never_started(order: Mapping[str, Any]) -> bool:
    """Return whether the order was cancelled before its saga started; else it was compensating in between."""
    state: tuple[str, int] = (order["status"], order["version"])
    return state == ("cancelled", 2)


def _answers(facts: Facts, answers: Answers) -> Iterator[str]:
    for key, told in answers.by_key.items():
        if len(told) > 1:
            yield f"I2: key {key} was answered in {len(told)} ways: {sorted(told)}"
    told_of = {location.rpartition("/")[2] for told in answers.by_key.values() for location, _ in told}
    yield from (f"I1: order {id_} was answered with 201 and is lost" for id_ in told_of - facts.orders.keys())
    yield from (f"I2: order {id_} is nobody's" for id_ in facts.orders.keys() - told_of)
    for id_, statuses in answers.cancels.items():
        possible = {"cancelled", "rejected"} if statuses & CANCEL_ACCEPTED else {"confirmed", "rejected"}
        if (status := facts.orders[id_]["status"]) not in possible:
            yield f"I5: order {id_} is {status}, and its cancels were answered {sorted(statuses)}"


def _events(facts: Facts) -> Iterator[str]:
    for id_, order in facts.orders.items():
        told = [("orders.order.placed.v1", 1), (f"orders.order.{order['status']}.v1", order["version"])]
        if facts.events[id_] != ([] if id_ in facts.pruned else told):
            yield f"I3: order {id_} is {order['status']}, and its events are {facts.events[id_]}"


def _heard(facts: Facts, heard: Sequence[Heard]) -> Iterator[str]:
    first_heard = list(dict.fromkeys(heard))
    yield from (f"I3: {event} is marked published, and nobody heard of it" for event in {*facts.published} - {*heard})
    yield from (f"I3: {event} was heard, and is no event of ours" for event in {*heard} - {*facts.published})
    latest: dict[str, int] = {}
    for event in first_heard:
        if event.sequence <= latest.get(event.subject, 0):
            yield f"I3: {event} was heard after number {latest[event.subject]}"
        latest[event.subject] = event.sequence


def _effects(facts: Facts) -> Iterator[str]:
    yield from (f"I4: event {id_} never took effect" for id_ in facts.unhandled)
    yield from (
        f"I4: order {id_} was pruned, and its inbox row is there" for id_ in {*facts.pruned} & {*facts.remembered}
    )
    for id_, order in facts.orders.items():
        never_started = _never_started(order)
        must_have_none = never_started or id_ in facts.pruned
        if must_have_none == (id_ in facts.sagas):
            yield f"I4: order {id_} is {order['status']}, and has {'a' if must_have_none else 'no'} saga"
        if never_started and id_ in facts.summary:
            yield f"I4: order {id_} was cancelled before its saga started, and partners acted for it"
    yield from (
        f"I4: partners acted for {id_}, which is no order" for id_ in facts.summary.keys() - facts.orders.keys()
    )
    moved = Counter((entry["saga_id"], entry["operation"]) for entry in facts.entries if entry["applied"])
    yield from (f"I4: {operation} moved {n} times for {id_}" for (id_, operation), n in moved.items() if n > 1)


def _money(facts: Facts) -> Iterator[str]:
    for id_, order in facts.orders.items():
        row = facts.summary.get(id_, {"charged_minor": 0, "refunded_minor": 0})
        balance = row["charged_minor"] - row["refunded_minor"]
        due = order["total_minor"] if order["status"] == "confirmed" else 0
        if balance != due:
            yield f"I5: order {id_} is {order['status']}, its balance {balance} and not {due}"
    live: Counter[tuple[str, str]] = Counter()
    for entry in facts.entries:
        if entry["applied"] and entry["operation"] in DELTAS:
            what, delta = DELTAS[entry["operation"]]
            live[entry["saga_id"], what] += delta
            if not 0 <= live[entry["saga_id"], what] <= 1:
                yield f"I5: {live[entry['saga_id'], what]} live {what} for {entry['saga_id']} at entry {entry['seq']}"


def _stock(facts: Facts, free_at_first: Mapping[str, int]) -> Iterator[str]:
    taken: Counter[str] = Counter()
    for id_, order in facts.orders.items():
        confirmed = order["status"] == "confirmed"
        taken += facts.lines[id_] if confirmed else Counter()
        row = facts.summary.get(id_, {"held": False, "committed": False, "shipped": False})
        if (row["held"], row["committed"], row["shipped"]) != (False, confirmed, confirmed):
            yield f"I7: order {id_} is {order['status']}, but at the partners it is {dict(row)}"
    for sku, stock in facts.stock.items():
        known = free_at_first.get(sku, FREE_AT_FIRST)
        if stock != {"free": known - taken[sku], "held": 0, "sold": taken[sku]}:
            yield f"I7: of {sku} there is {stock}, with {taken[sku]} in confirmed orders"
