"""The sandbox's routes: the partner calls that the service makes, and the simulator's own for tests and people.

Partner calls follow the partner contract and need an `Idempotency-Key`. `/ledger`, `/stock` and `/faults`
belong to the simulator and need none.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypedDict

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sandbox import faults, inventory, pages, payment, problems, shipping
from sandbox.calls import Body, PartnerCall, SagaId
from sandbox.delivery import deliver
from sandbox.faults import Rule
from sandbox.ledger import Ledger
from sandbox.problems import ProblemError

KeyHeader = Annotated[str | None, Header(alias="Idempotency-Key")]
MAX_SQLITE_INTEGER = 2**63 - 1  # the largest integer that SQLite can store

ItemId = Annotated[str, PathParameter(min_length=1, max_length=200)]
Limit = Annotated[int | None, Query(ge=1, le=MAX_SQLITE_INTEGER)]

partners = APIRouter(tags=["partners"])
simulator = APIRouter(tags=["simulator"])


class RequestState(TypedDict):
    """The values that the lifespan puts into each request's state."""

    ledger: Ledger


class Shelf(BaseModel):
    """The free quantity to set for an item."""

    model_config = ConfigDict(extra="forbid", strict=True)

    quantity: Annotated[int, Field(ge=0, le=10**12)]


async def current_ledger(request: Request) -> Ledger:
    """Return the ledger after expiring overdue holds, so that a read never shows one."""
    ledger: Ledger = request.state.ledger
    with ledger.transaction() as db:
        inventory.expire_holds(db)
    return ledger


CurrentLedger = Annotated[Ledger, Depends(current_ledger)]


@partners.post("/v1/inventory/hold", status_code=201)
async def hold(request: Request, body: inventory.Hold, key: KeyHeader = None) -> Response:
    """Reserve all items for `ttl_seconds`, or none."""
    return await deliver(request, PartnerCall.from_request(inventory.HOLD, key, body), inventory.hold)


@partners.post("/v1/inventory/commit")
async def commit(request: Request, body: Body, key: KeyHeader = None) -> Response:
    """Sell the held items."""
    return await deliver(request, PartnerCall.from_request(inventory.COMMIT, key, body), inventory.commit)


@partners.post("/v1/inventory/release")
async def release(request: Request, body: Body, key: KeyHeader = None) -> Response:
    """Return held or sold items to free stock, and block any later hold or commit."""
    return await deliver(request, PartnerCall.from_request(inventory.RELEASE, key, body), inventory.release)


@partners.get("/v1/inventory/holds/{saga_id}")
async def hold_state(saga_id: SagaId, ledger: CurrentLedger) -> dict[str, str]:
    """Show the state of a hold: `held`, `committed`, `released` or `expired`."""
    with ledger.transaction() as db:
        return _make_state_body(saga_id, inventory.state_of(db, saga_id))


@partners.get("/v1/inventory/stock/{item_id:path}")
async def stock(item_id: ItemId, ledger: CurrentLedger) -> dict[str, int]:
    """Show the free, held and sold quantity of an item. A new item has 1,000,000 free; `OUT-OF-STOCK` has none."""
    with ledger.transaction() as db:
        return inventory.stock(db, item_id)


@partners.post("/v1/payments/charge", status_code=201)
async def charge(request: Request, body: payment.Charge, key: KeyHeader = None) -> Response:
    """Charge a saga once."""
    return await deliver(request, PartnerCall.from_request(payment.CHARGE, key, body), payment.charge)


@partners.post("/v1/payments/refund")
async def refund(request: Request, body: Body, key: KeyHeader = None) -> Response:
    """Refund the saga's charge, if any, and block any later charge."""
    return await deliver(request, PartnerCall.from_request(payment.REFUND, key, body), payment.refund)


@partners.get("/v1/payments/{saga_id}")
async def payment_state(saga_id: SagaId, ledger: CurrentLedger) -> dict[str, str]:
    """Show the state of a payment: `charged`, `declined` or `refunded`."""
    with ledger.transaction() as db:
        return _make_state_body(saga_id, payment.state_of(db, saga_id))


@partners.post("/v1/shipments", status_code=201)
async def create_shipment(request: Request, body: shipping.Shipment, key: KeyHeader = None) -> Response:
    """Create a saga's shipment once."""
    return await deliver(request, PartnerCall.from_request(shipping.CREATE, key, body), shipping.create)


@partners.post("/v1/shipments/cancel")
async def cancel_shipment(request: Request, body: Body, key: KeyHeader = None) -> Response:
    """Cancel the saga's shipment, if any, and block any later shipment."""
    return await deliver(request, PartnerCall.from_request(shipping.CANCEL, key, body), shipping.cancel)


@partners.get("/v1/shipments/{saga_id}")
async def shipment_state(saga_id: SagaId, ledger: CurrentLedger) -> dict[str, str]:
    """Show the state of a shipment: `created`, `refused` or `cancelled`."""
    with ledger.transaction() as db:
        return _make_state_body(saga_id, shipping.state_of(db, saga_id))


@simulator.get("/ledger")
async def entries(
    ledger: CurrentLedger,
    saga_id: str | None = None,
    after: Annotated[int, Query(ge=0, le=MAX_SQLITE_INTEGER)] = 0,
    limit: Limit = None,
) -> JSONResponse:
    """List the ledger entries with a `seq` greater than `after`, oldest first; all of them without a `limit`.

    `outcome` is `done`, `replayed`, `refused`, `undone`, `nothing-to-undo` or `error` (the partner made no
    decision; `detail` has the reason). `applied` is true if the call moved a saga's money, stock or parcel.
    `amount_minor` is set if it moved money. `key` is null if no partner call caused the entry: a hold expired, or
    `PUT /stock` set the free quantity of an item (`stock.set`, without a saga; `detail` is JSON).
    """
    return JSONResponse({"entries": ledger.entries(saga_id or None, after, limit)})


@simulator.get("/ledger/summary")
async def summary(
    ledger: CurrentLedger,
    saga_id: str | None = None,
    after: Annotated[str, Query(max_length=64)] = "",
    limit: Limit = None,
    *,
    details: bool = False,
) -> JSONResponse:
    """Sum up the entries: `{"sagas": {saga_id: {charged_minor, refunded_minor, held, committed, shipped}}}`.

    The amounts are totals of all charges and refunds; the flags show the current state. `details` adds `moves`, the
    number of applied entries of each operation, and `items`, the quantities that are held or sold. Without `saga_id`,
    the summary covers every saga that has an entry, ordered by id: up to `limit` of those with an id greater than
    `after`.
    """
    return JSONResponse({"sagas": ledger.summary(saga_id or None, after, limit, details=details)})


@simulator.get("/ledger/totals")
async def totals(ledger: CurrentLedger, after: Annotated[int, Query(ge=0, le=MAX_SQLITE_INTEGER)] = 0) -> JSONResponse:
    """Count the applied entries of each operation: `{"seq", "operations": {name: {moves, amount_minor}}, …}`.

    Only entries with a `seq` greater than `after` count. `seq` is the last one that was counted, so with it as `after`
    the next answer has what was added since. `items` and `stock` do not depend on `after`: how many items were ever
    moved or set, and the sums `{free, held, sold, supplied}` of their stock.
    """
    seq, operations = ledger.totals(after)
    stock = ledger.whole_stock(inventory.INITIAL_FREE, inventory.INITIALLY_EMPTY_ITEM)
    return JSONResponse({"seq": seq, "operations": operations, "items": stock.pop("items"), "stock": stock})


@simulator.get("/ledger/stock")
async def stock_summary(
    ledger: CurrentLedger, after: Annotated[str, Query(max_length=200)] = "", limit: Limit = None
) -> JSONResponse:
    """Show the stock of each item that was ever moved or set: `{"items": {id: {free, held, sold, supplied}}}`.

    `supplied` is what the ledger says was ever put on the shelf: the initial stock and each change by `PUT /stock`.
    So free + held + sold must equal it. Items are paged like the sagas of the summary.
    """
    return JSONResponse({"items": ledger.stock(after, limit, inventory.INITIAL_FREE, inventory.INITIALLY_EMPTY_ITEM)})


@simulator.put("/stock/{item_id:path}")
async def set_stock(item_id: ItemId, shelf: Shelf, ledger: CurrentLedger) -> dict[str, int]:
    """Set the free quantity of an item; held and sold quantities stay. The ledger records it as `stock.set`."""
    with ledger.transaction() as db:
        inventory.set_free(db, item_id, shelf.quantity)
        return inventory.stock(db, item_id)


@simulator.get("/faults")
async def list_faults(ledger: CurrentLedger) -> list[Rule]:
    """List the fault rules in order, each with its remaining `times`."""
    with ledger.transaction() as db:
        return faults.load_rules(db)


@simulator.put("/faults")
async def replace_faults(rules: list[Rule], ledger: CurrentLedger) -> list[Rule]:
    """Replace all fault rules."""
    with ledger.transaction() as db:
        faults.replace_rules(db, rules)
        return faults.load_rules(db)


@simulator.delete("/faults", status_code=204)
async def clear_faults(ledger: CurrentLedger) -> None:
    """Delete all fault rules, so that every call succeeds."""
    with ledger.transaction() as db:
        faults.replace_rules(db, [])


@simulator.get("/livez")
async def livez() -> dict[str, str]:
    """Report that the process is up."""
    return {"status": "ok"}


def create_app(ledger_path: Path | None) -> FastAPI:
    """Build the sandbox on the ledger file at `ledger_path` (created if absent); None keeps the ledger in memory.

    The server opens the file when it starts. It fails to start with `sqlite3.DatabaseError` if the file is not
    a SQLite database.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[RequestState]:
        ledger = Ledger(ledger_path)
        try:
            yield {"ledger": ledger}
        finally:
            ledger.close()

    app = FastAPI(
        title="Partner sandbox",
        docs_url=None,  # `pages` serves it from local files
        generate_unique_id_function=_make_operation_id,
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={
            ProblemError: problems.on_problem,
            HTTPException: problems.on_http_error,
            RequestValidationError: problems.on_invalid,
        },
    )
    app.include_router(partners)
    app.include_router(simulator)
    app.include_router(pages.router)
    return app


def _make_operation_id(route: APIRoute) -> str:
    """Name an operation after its function: `set_stock` → `setStock`."""
    first, *others = route.name.split("_")
    return first + "".join(word.capitalize() for word in others)


def _make_state_body(saga_id: str, state: str | None) -> dict[str, str]:
    if state is None:
        raise ProblemError(404, "not-found", "The partner has no record of this saga.")
    return {"saga_id": saga_id, "state": state}
