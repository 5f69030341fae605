"""Inventory: each unit of stock is either free, held or sold.

A hold expires at `expires_at`. The first request after that returns its stock and writes a ledger entry:
`inventory.release`, `done`, applied, without a key, with the detail `expired`.
"""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import uuid4

from pydantic import Field

from sandbox import ledger
from sandbox.calls import Body, Line, Operation, PartnerCall, PartnerDecision, refuse
from sandbox.problems import problem

HOLD = Operation("inventory.hold", "reserve_inventory", "reserve_inventory:undo", (409, "out-of-stock"))
COMMIT = Operation("inventory.commit", "commit_inventory", "reserve_inventory:undo", (409, "hold-expired"))
RELEASE = Operation("inventory.release", "reserve_inventory:undo")
STOCK_SET = "stock.set"  # the ledger's name for `PUT /stock`

INITIAL_FREE = 1_000_000
INITIALLY_EMPTY_ITEM = "OUT-OF-STOCK"
MONTH_SECONDS = 30 * 86400

StockPart = Literal["free", "held", "sold"]


class Hold(Body):
    """The items to hold. Quantities of the same item are added up."""

    items: Annotated[list[Line], Field(min_length=1, max_length=1000)]
    ttl_seconds: Annotated[float, Field(gt=0, le=MONTH_SECONDS)]


def hold(db: sqlite3.Connection, call: PartnerCall[Hold]) -> PartnerDecision:
    """Hold all lines or none."""
    expire_holds(db)
    quantities: Counter[str] = Counter()
    for line in call.body.items:
        quantities[line.item_id] += line.qty
    if call.refuse or any(stock(db, item_id)["free"] < qty for item_id, qty in quantities.items()):
        return refuse(call.operation)
    expires_at = time.time() + call.body.ttl_seconds
    _move(db, quantities, "free", "held")
    db.execute(
        "INSERT INTO holds (saga_id, state, expires_at, items) VALUES (?, 'held', ?, ?)",
        (call.body.saga_id, expires_at, json.dumps(quantities)),
    )
    expires_at_text = datetime.fromtimestamp(expires_at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return PartnerDecision(
        "done", 201, {"reservation_id": f"res_{uuid4().hex}", "expires_at": expires_at_text}, applied=True
    )


def commit(db: sqlite3.Connection, call: PartnerCall[Body]) -> PartnerDecision:
    """Sell the held items. Without a hold, answer 404 and leave the key unused."""
    saga_id = call.body.saga_id
    expire_holds(db)
    state = state_of(db, saga_id)
    if call.refuse or state == "expired":
        return refuse(call.operation)
    if state is None:
        body = problem(404, "no-hold", "This saga has no hold.")
        return PartnerDecision("error", 404, body, detail=body["code"], remembered=False)
    _change_hold(db, saga_id, "held", "committed", "sold")
    return PartnerDecision("done", 200, {"saga_id": saga_id, "state": "committed"}, applied=True)


def release(db: sqlite3.Connection, call: PartnerCall[Body]) -> PartnerDecision:
    """Return held or sold items. An expired hold stays `expired`, because its stock was returned already."""
    saga_id = call.body.saga_id
    expire_holds(db)
    returned = any(_change_hold(db, saga_id, state, "released", "free") for state in ("held", "committed"))
    db.execute("INSERT INTO holds VALUES (?, 'released', 0, '{}') ON CONFLICT DO NOTHING", (saga_id,))
    answer = {"saga_id": saga_id, "state": state_of(db, saga_id)}
    return PartnerDecision("done" if returned else "nothing-to-undo", 200, answer, applied=returned)


def expire_holds(db: sqlite3.Connection) -> None:
    """Return the stock of every expired hold, with one entry each. Every reader of holds or stock calls this first."""
    expired = db.execute(
        "SELECT saga_id FROM holds WHERE state = 'held' AND expires_at <= ?", (time.time(),)
    ).fetchall()
    for row in expired:
        _change_hold(db, row["saga_id"], "held", "expired", "free")
        ledger.append(
            db, saga_id=row["saga_id"], operation=RELEASE.name, outcome="done", applied=True, detail="expired"
        )


def state_of(db: sqlite3.Connection, saga_id: str) -> str | None:
    """Return `held`, `committed`, `expired`, `released` (also if nothing was held before), or None if unknown."""
    row = db.execute("SELECT state FROM holds WHERE saga_id = ?", (saga_id,)).fetchone()
    return None if row is None else str(row["state"])


def stock(db: sqlite3.Connection, item_id: str) -> dict[str, int]:
    """Return the free, held and sold quantity of an item."""
    row = db.execute("SELECT free, held, sold FROM stock WHERE item_id = ?", (item_id,)).fetchone()
    if row is None:
        return {"free": 0 if item_id == INITIALLY_EMPTY_ITEM else INITIAL_FREE, "held": 0, "sold": 0}
    return dict(row)


def set_free(db: sqlite3.Connection, item_id: str, quantity: int) -> None:
    """Set the free quantity of an item, and record the change; held and sold quantities stay."""
    before = stock(db, item_id)["free"]
    db.execute(
        "INSERT INTO stock (item_id, free) VALUES (?, ?) ON CONFLICT DO UPDATE SET free = excluded.free",
        (item_id, quantity),
    )
    # The entry belongs to no saga. It moves nothing of a saga's, so it does not count as applied.
    detail = json.dumps({"item_id": item_id, "free_before": before, "free": quantity})
    ledger.append(db, saga_id="", operation=STOCK_SET, outcome="done", detail=detail)


def _change_hold(db: sqlite3.Connection, saga_id: str, old_state: str, new_state: str, target: StockPart) -> bool:
    """Move a hold and its stock to a new state. Return false if the hold was not in `old_state`."""
    row = db.execute(
        "UPDATE holds SET state = ? WHERE saga_id = ? AND state = ? RETURNING items", (new_state, saga_id, old_state)
    ).fetchone()
    if row is not None:
        _move(db, json.loads(row["items"]), "held" if old_state == "held" else "sold", target)
    return row is not None


def _move(db: sqlite3.Connection, items: Mapping[str, int], source: StockPart, target: StockPart) -> None:
    for item_id, qty in items.items():
        counts = stock(db, item_id)
        counts[source] -= qty
        counts[target] += qty
        db.execute(
            "INSERT OR REPLACE INTO stock (item_id, free, held, sold) VALUES (:item_id, :free, :held, :sold)",
            {"item_id": item_id, **counts},
        )
