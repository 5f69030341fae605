"""The partner sandbox, as the playground uses it: its faults, and the sums of its ledger."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from app.errors import PartnerUnavailable
from app.partners.http import HttpClient, Interrupted, NotConnected, Target
from app.values import immutable

CALL_SECONDS = 1.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024
SHOWN_ITEMS = 6

Rule = Mapping[str, Any]


@immutable
class Stock:
    """The stock of one item, or of all. `supplied`: all that was ever put on the shelf."""

    free: int
    held: int
    sold: int
    supplied: int

    @property
    def is_conserved(self) -> bool:
        """Return whether every unit is accounted for."""
        return self.free + self.held + self.sold == self.supplied


@immutable
class Ledger:
    """The sums of the ledger. `moves`, `amounts_minor`: of each operation, since the ledger exists.

    `stock`: of all items. `shelves`: the stock of the first SHOWN_ITEMS of `items` items, by their ids.
    """

    moves: Mapping[str, int]
    amounts_minor: Mapping[str, int]
    stock: Stock
    items: int
    shelves: Mapping[str, Stock]

    @property
    def charged_minor(self) -> int:
        """Return the sum of all charges."""
        return self.amounts_minor.get("payment.charge", 0)

    @property
    def refunded_minor(self) -> int:
        """Return the sum of all refunds."""
        return self.amounts_minor.get("payment.refund", 0)

    @property
    def shipped(self) -> int:
        """Return how many shipments exist."""
        return self.moves.get("shipping.create", 0) - self.moves.get("shipping.cancel", 0)


class Partners:
    """The sandbox at `url`. Each call ends within CALL_SECONDS, and raises PartnerUnavailable."""

    def __init__(self, http: HttpClient, url: str) -> None:
        self._http = http
        self._target = Target.parse(url)
        self._changing = asyncio.Lock()  # the faults are replaced as a whole
        self._seq = 0
        self._moves: dict[str, int] = {}
        self._amounts_minor: dict[str, int] = {}

    async def read_faults(self) -> list[Rule]:
        """Return the rules that still have an effect."""
        return [rule for rule in await self._call("GET", "/faults") if rule["times"] != 0]

    async def add_faults(self, rules: Sequence[Rule]) -> None:
        """Add rules to those that still have an effect, but none that applies without limit already."""
        async with self._changing:
            active = await self.read_faults()
            new = [rule for rule in rules if not any(_is_unlimited(rule, known) for known in active)]
            await self._call("PUT", "/faults", [*active, *new])

    async def remove_faults(self, rules: Sequence[Rule]) -> None:
        """Remove the rules that have a target and a kind of one of these."""
        async with self._changing:
            gone = {(rule["target"], rule["kind"]) for rule in rules}
            kept = [rule for rule in await self.read_faults() if (rule["target"], rule["kind"]) not in gone]
            await self._call("PUT", "/faults", kept)

    async def clear_faults(self) -> None:
        """Remove all rules."""
        async with self._changing:
            await self._call("DELETE", "/faults")

    async def read_ledger(self) -> Ledger:
        """Sum the ledger up: read what was added since the last time. One caller at a time."""
        new = await self._call("GET", f"/ledger/totals?after={self._seq}")
        self._seq = new["seq"]
        for name, total in new["operations"].items():
            self._moves[name] = self._moves.get(name, 0) + total["moves"]
            self._amounts_minor[name] = self._amounts_minor.get(name, 0) + total["amount_minor"]
        first = (await self._call("GET", f"/ledger/stock?limit={SHOWN_ITEMS}"))["items"]
        shelves = {item: Stock(**counts) for item, counts in first.items()}
        return Ledger(dict(self._moves), dict(self._amounts_minor), Stock(**new["stock"]), new["items"], shelves)

    async def _call(self, method: str, path: str, value: Any = None) -> Any:
        body = None if value is None else json.dumps(value).encode()
        fields = {} if value is None else {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(CALL_SECONDS):
                reply = await self._http.exchange(
                    self._target, self._target.request(method, path, fields, body), CALL_SECONDS, MAX_ANSWER_BYTES
                )
        except (TimeoutError, NotConnected, Interrupted) as error:
            raise PartnerUnavailable("the partner sandbox does not answer") from error
        if reply.status == HTTPStatus.NO_CONTENT:
            return None
        if reply.status != HTTPStatus.OK:
            raise PartnerUnavailable(f"the partner sandbox answered {reply.status}")
        return json.loads(reply.body)


def _is_unlimited(rule: Rule, active: Rule) -> bool:
    """Return whether the active rule is this one, and never ends by itself."""
    return active["times"] is None and {**active, **rule} == active
