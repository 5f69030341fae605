"""Judge pages of orders by what the partners have: I4 (moves), I5, I7. A partner that fails is not asked again."""

from collections.abc import Iterator, Mapping, Sequence
from uuid import UUID

from app import db
from app.errors import PartnerUnavailable
from app.operations.verify import balances, effects, snapshot
from app.operations.verify.books import NOTHING, Book, LedgerBook, PartnerRecord
from app.operations.verify.findings import Findings, Invariant, Suspicion
from app.operations.verify.snapshot import OrderFacts

# What cannot be judged without a partner. I4 needs all of them: any may have acted twice.
JUDGED_BY = {
    "inventory": (Invariant.I7, Invariant.I4),
    "payment": (Invariant.I5, Invariant.I4),
    "shipping": (Invariant.I7, Invariant.I4),
}
ONLY_STATES = "{} has no ledger: its state of each order was asked for, not amounts, repeats or stray calls"


class PartnersSide:
    """The partners in one pass. `missing`: why a partner cannot be asked at all, by its name."""

    def __init__(self, pool: db.Pool, books: Sequence[Book], missing: Mapping[str, str], found: Findings) -> None:
        self._pool = pool
        self._found = found
        self._books = list(books)
        for partner, reason in missing.items():
            found.hinder(reason, *JUDGED_BY[partner])
        for book in books:
            if not book.has_ledger:
                for partner in sorted(book.partners):
                    found.note(ONLY_STATES.format(partner), *JUDGED_BY[partner])

    async def judge_page(self, orders: Sequence[OrderFacts], after: UUID, end: UUID) -> list[Suspicion]:
        """Judge a page: the orders, and every saga in a ledger with an id greater than `after`, up to `end`."""
        suspicions: list[Suspicion] = []
        for book in tuple(self._books):
            try:
                records: Mapping[str, PartnerRecord]
                if isinstance(book, LedgerBook):
                    records = await self._read_ledger(book, orders, str(after), str(end))
                else:
                    records = await book.read(orders)
            except PartnerUnavailable as error:
                self._give_up(book, error)
                continue
            suspicions += _judge(orders, book, records)
            self._count(book, sum(order.is_final for order in orders))
        return suspicions

    async def judge_again(self, orders: Sequence[OrderFacts], ids: Sequence[UUID]) -> list[Suspicion]:
        """Judge orders that looked wrong by fresh records. `ids`: those looked for; the others are strays."""
        suspicions: list[Suspicion] = []
        strays = sorted({str(order_id) for order_id in ids} - {str(order.id) for order in orders})
        for book in tuple(self._books):
            try:
                suspicions += _judge(orders, book, await book.read(orders))
                for saga_id, record in (await book.read_ids(strays)).items() if isinstance(book, LedgerBook) else ():
                    suspicions += effects.judge_stray(saga_id, record)
            except PartnerUnavailable as error:
                self._give_up(book, error)
        return suspicions

    async def judge_rest(self, after: UUID) -> None:
        """Judge what a ledger has after the last order, and the stock of every item."""
        for book in tuple(self._books):
            if not isinstance(book, LedgerBook):
                continue
            try:
                await self._read_ledger(book, (), str(after), None)
                if "inventory" in book.partners:
                    await self._judge_shelves(book)
            except PartnerUnavailable as error:
                self._give_up(book, error)

    async def _read_ledger(
        self, book: LedgerBook, orders: Sequence[OrderFacts], after: str, end: str | None
    ) -> dict[str, PartnerRecord]:
        """Return the records of the orders; report strays at once, so that they need no memory."""
        records = {str(order.id): NOTHING for order in orders}
        async for page in book.walk(after, end):
            records.update((saga_id, record) for saga_id, record in page.items() if saga_id in records)
            await self._judge_strays({saga_id: page[saga_id] for saga_id in page.keys() - records.keys()})
        return records

    async def _judge_strays(self, unknown: Mapping[str, PartnerRecord]) -> None:
        """Report sagas that are no order. Looking now is conclusive: partners only act for committed orders."""
        if not unknown:
            return
        ids = {saga_id: _parse_id(saga_id) for saga_id in unknown}
        async with db.connection(self._pool) as conn:
            missing = await snapshot.find_missing(conn, [order_id for order_id in ids.values() if order_id])
        for saga_id, order_id in sorted(ids.items()):
            if order_id is None or order_id in missing:
                self._found.suspect(effects.judge_stray(saga_id, unknown[saga_id]))

    async def _judge_shelves(self, book: LedgerBook) -> None:
        async for page in book.walk_stock():
            for item in (item for item, stock in page.items() if not balances.adds_up(stock)):
                async with db.connection(self._pool) as conn:
                    orders = await snapshot.find_orders_with(conn, item)
                self._found.suspect([balances.judge_shelf(item, page[item], orders)])

    def _give_up(self, book: Book, error: PartnerUnavailable) -> None:
        self._books.remove(book)
        for partner in sorted(book.partners):
            self._found.hinder(f"{partner}: {error}", *JUDGED_BY[partner])

    def _count(self, book: Book, final: int) -> None:
        if "payment" in book.partners:
            self._found.count(final, Invariant.I5)
        if "inventory" in book.partners:
            self._found.count(final, Invariant.I7)


def _judge(orders: Sequence[OrderFacts], book: Book, records: Mapping[str, PartnerRecord]) -> Iterator[Suspicion]:
    for order in orders:
        if (record := records.get(str(order.id))) is None:
            continue
        yield from effects.judge_moves(order, record)
        for partner in book.partners if order.is_final else ():
            yield from balances.judge(order, partner, record)


def _parse_id(text: str) -> UUID | None:
    """Return the id in its only spelling; None for anything else."""
    try:
        order_id = UUID(text)
    except ValueError:
        return None
    return order_id if str(order_id) == text else None
