"""The sandbox's SQLite file: an append-only ledger of every decision, and the partners' current state.

One transaction commits a decision: its state change, its stored answer and its ledger entry.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

EntryOutcome = Literal["done", "replayed", "refused", "undone", "nothing-to-undo", "error"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    saga_id TEXT NOT NULL,
    operation TEXT NOT NULL,
    key TEXT,
    outcome TEXT NOT NULL,
    applied INTEGER NOT NULL,
    amount_minor INTEGER,
    detail TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS ledger_of_a_saga ON ledger (saga_id, seq);
CREATE TRIGGER IF NOT EXISTS ledger_never_changes BEFORE UPDATE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS ledger_never_shrinks BEFORE DELETE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;

CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, status INTEGER NOT NULL, body TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS stock (
    item_id TEXT PRIMARY KEY,
    free INTEGER NOT NULL CHECK (free >= 0),
    held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0),
    sold INTEGER NOT NULL DEFAULT 0 CHECK (sold >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holds (
    saga_id TEXT PRIMARY KEY, state TEXT NOT NULL, expires_at REAL NOT NULL, items TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS holds_by_expiry ON holds (expires_at) WHERE state = 'held';
CREATE TABLE IF NOT EXISTS payments (
    saga_id TEXT PRIMARY KEY, state TEXT NOT NULL, amount_minor INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shipments (saga_id TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS faults (position INTEGER PRIMARY KEY, rule TEXT NOT NULL) STRICT;
"""

# Each operation applies at most once per saga: a later call is a replay, or the tombstone blocks it. So sums and
# flags over the applied entries give a saga's state from the ledger alone; `moves` shows an operation that broke the
# rule. The index on (saga_id, seq) gives the order, so a page reads only its own sagas.
SUMMARY = """
SELECT saga_id,
       coalesce(sum(amount_minor) FILTER (WHERE operation = 'payment.charge'), 0) AS charged_minor,
       coalesce(sum(amount_minor) FILTER (WHERE operation = 'payment.refund'), 0) AS refunded_minor,
       max(operation = 'inventory.hold' AND applied) AS hold,
       max(operation = 'inventory.commit' AND applied) AS sale,
       max(operation = 'inventory.release' AND applied) AS release,
       max(operation = 'shipping.create' AND applied) AS shipment,
       max(operation = 'shipping.cancel' AND applied) AS cancellation,
       group_concat(operation) FILTER (WHERE applied) AS moves,
       (SELECT items FROM holds WHERE holds.saga_id = ledger.saga_id AND state IN ('held', 'committed')) AS items
FROM ledger WHERE {selected} GROUP BY saga_id ORDER BY saga_id LIMIT :limit
"""
ONE_SAGA, LATER_SAGAS = "saga_id = :saga_id", "saga_id > :after"  # entries of `PUT /stock` have no saga: ''

# A reader that keeps its sums asks for what came after the last `seq` that it has seen.
TOTALS = """
SELECT operation, count(*) AS moves, coalesce(sum(amount_minor), 0) AS amount_minor, max(seq) AS seq
FROM ledger WHERE seq > ? AND applied GROUP BY operation
"""

# What the ledger says was ever put on the shelf of an item: its initial stock, and each change by `PUT /stock`.
WHOLE_STOCK = """
SELECT count(*) AS items,
       coalesce(sum(free), 0) AS free, coalesce(sum(held), 0) AS held, coalesce(sum(sold), 0) AS sold,
       count(*) FILTER (WHERE item_id <> :empty_item) * :initial_free + coalesce((
           SELECT sum(detail ->> '$.free' - detail ->> '$.free_before') FROM ledger
           WHERE saga_id = '' AND operation = 'stock.set'
       ), 0) AS supplied
FROM stock
"""
STOCK = """
SELECT item_id, free, held, sold,
       (CASE item_id WHEN :empty_item THEN 0 ELSE :initial_free END) + coalesce((
           SELECT sum(detail ->> '$.free' - detail ->> '$.free_before') FROM ledger
           WHERE saga_id = '' AND operation = 'stock.set' AND detail ->> '$.item_id' = stock.item_id
       ), 0) AS supplied
FROM stock WHERE item_id > :after ORDER BY item_id LIMIT :limit
"""


class Ledger:
    """An open ledger file, or a ledger in memory. Only the thread that opened it may use it."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
        self._db.row_factory = sqlite3.Row
        # A commit returns once the kernel has the data, so killing this process loses nothing; only a power failure
        # can lose the last commits. SQLite syncs once per checkpoint instead of once per call, which allows
        # thousands of calls per second.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file. All entries are committed already."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in one transaction: commit at its end, roll back if it raises."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    def entries(self, saga_id: str | None, after: int, limit: int | None) -> list[dict[str, Any]]:
        """Return the entries with a `seq` greater than `after`, in order. None selects every saga, or sets no limit."""
        rows = self._db.execute(
            "SELECT * FROM ledger WHERE seq > ? AND (? IS NULL OR saga_id = ?) ORDER BY seq LIMIT ?",
            (after, saga_id, saga_id, -1 if limit is None else limit),
        )
        return [{**row, "applied": bool(row["applied"])} for row in rows]

    def summary(
        self, saga_id: str | None, after: str, limit: int | None, *, details: bool
    ) -> dict[str, dict[str, Any]]:
        """Return for each saga the total of its charges and refunds, and flags for its current state.

        Sagas are ordered by id, from the first one greater than `after`; with `saga_id`, only that one. `details` adds
        the moves, and the items that are held or sold.
        """
        rows = self._db.execute(
            SUMMARY.format(selected=LATER_SAGAS if saga_id is None else ONE_SAGA),
            {"saga_id": saga_id, "after": after, "limit": -1 if limit is None else limit},
        )
        return {
            row["saga_id"]: {
                "charged_minor": row["charged_minor"],
                "refunded_minor": row["refunded_minor"],
                "held": bool(row["hold"] and not row["sale"] and not row["release"]),
                "committed": bool(row["sale"] and not row["release"]),
                "shipped": bool(row["shipment"] and not row["cancellation"]),
                **(_show_details(row) if details else {}),
            }
            for row in rows
        }

    def totals(self, after: int) -> tuple[int, dict[str, dict[str, int]]]:
        """Return the last `seq` that was counted (`after` if none), and the moves and the money of each operation."""
        rows = self._db.execute(TOTALS, (after,)).fetchall()
        operations = {row["operation"]: {"moves": row["moves"], "amount_minor": row["amount_minor"]} for row in rows}
        return max((row["seq"] for row in rows), default=after), operations

    def whole_stock(self, initial_free: int, empty_item: str) -> dict[str, int]:
        """Return how many `items` were ever moved or set, and the sums of what `stock` returns of each."""
        return dict(self._db.execute(WHOLE_STOCK, {"initial_free": initial_free, "empty_item": empty_item}).fetchone())

    def stock(self, after: str, limit: int | None, initial_free: int, empty_item: str) -> dict[str, dict[str, int]]:
        """Return free, held, sold and supplied quantities of items that were ever moved or set, ordered by id."""
        rows = self._db.execute(
            STOCK,
            {
                "after": after,
                "limit": -1 if limit is None else limit,
                "initial_free": initial_free,
                "empty_item": empty_item,
            },
        )
        return {row["item_id"]: {name: row[name] for name in ("free", "held", "sold", "supplied")} for row in rows}


def _show_details(row: sqlite3.Row) -> dict[str, dict[str, int]]:
    moves = row["moves"].split(",") if row["moves"] else ()
    return {"moves": dict(Counter(moves)), "items": json.loads(row["items"] or "{}")}


def append(
    db: sqlite3.Connection,
    *,
    saga_id: str,
    operation: str,
    outcome: EntryOutcome,
    key: str | None = None,
    applied: bool = False,
    amount_minor: int | None = None,
    detail: str | None = None,
) -> None:
    """Write one entry in the current transaction. `applied`: the call moved a saga's money, stock or parcel."""
    at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    db.execute(
        "INSERT INTO ledger (at, saga_id, operation, key, outcome, applied, amount_minor, detail)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (at, saga_id, operation, key, outcome, applied, amount_minor, detail),
    )
