"""The calls of the partner contract by operation, and sandbox processes that tests can kill."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.orders.model import Line, Order, Status
from app.partners.ports import Outcome, PartnerItem
from app.saga.steps import Action, StepCall, StepRequest
from tests.harness.sandboxes import HOLD_SECONDS, Partners, charge_of
from tests.harness.steps import OPERATIONS, PLAN
from tests.harness.stripe_fake import StripeFake
from tests.harness.wait import AMPLE_SECONDS, wait_until

SERVER = """
import socket, sys, uvicorn
from pathlib import Path
from sandbox import create_app, http_protocol
config = uvicorn.Config(create_app(Path(sys.argv[1])), http=http_protocol, log_config=None)
uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[2]))])
"""


PartnerAction = Callable[[Partners, UUID, PartnerItem], Awaitable[Outcome]]


def act_of(call: StepCall) -> PartnerAction:
    """Return a step's call for an order of one item that costs 7 EUR."""

    def act(to: Partners, saga: UUID, item: PartnerItem) -> Awaitable[Outcome]:
        now = datetime.now(UTC)
        order = Order(
            id=saga, tenant="contract", status=Status.PENDING, status_reason=None, customer_id=None, currency="EUR",
            lines=(Line(item.sku, item.quantity, 700 // item.quantity),), payment_method="pm_card_visa",
            shipping_address=None, metadata=None, tracking_id=None, version=1, placed_at=now, updated_at=now,
        )  # fmt: skip
        return call(to.ports, StepRequest(order, now, HOLD_SECONDS))

    return act


DO = {OPERATIONS[spec.step, Action.DO]: act_of(spec.do) for spec in PLAN}
UNDO = {OPERATIONS[spec.step, Action.UNDO]: act_of(spec.undo) for spec in PLAN if spec.undo is not None}
ACTS = {**DO, **UNDO}
UNDONE_BY = {
    OPERATIONS[spec.step, Action.DO]: OPERATIONS[spec.compensated_by or spec.step, Action.UNDO] for spec in PLAN
}
REFUSALS = {OPERATIONS[spec.step, Action.DO]: str(reason) for spec in PLAN for reason in spec.refusals}


@dataclass
class SandboxProcess:
    """A sandbox in its own process, on a ledger file. The test owns the port, so callers wait while it is down."""

    ledger: Path
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=512))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def start(self) -> None:
        number = self.listener.fileno()
        command = [sys.executable, "-c", SERVER, str(self.ledger), str(number)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(command, pass_fds=[number], env=environment)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=AMPLE_SECONDS)


@pytest.fixture
def start_sandbox(tmp_path: Path) -> Iterator[Callable[..., SandboxProcess]]:
    with contextlib.ExitStack() as stack:

        def start() -> SandboxProcess:
            sandbox = SandboxProcess(tmp_path / "ledger.sqlite")
            stack.callback(sandbox.listener.close)
            stack.callback(sandbox.kill)
            sandbox.start()
            return sandbox

        yield start


@pytest.fixture
def saga() -> UUID:
    return uuid4()


@pytest.fixture
def item() -> PartnerItem:
    """Two units of an item that no other test uses."""
    return PartnerItem(f"item-{uuid4().hex[:12]}", 2)


async def post(http: httpx.AsyncClient, path: str, key: str | None, body: Any) -> httpx.Response:
    """Make one partner call as plain HTTP."""
    return await http.post(path, json=body, headers={} if key is None else {"Idempotency-Key": key})


async def prepare(partners: Partners, saga: UUID, item: PartnerItem, operation: str) -> None:
    """Make the calls that must precede the operation."""
    if operation in ("inventory.commit", "inventory.release"):
        await partners.inventory.hold(saga, [item], HOLD_SECONDS)
    if operation == "payment.refund":
        await partners.payment.charge(charge_of(saga, 700, "EUR", "pm_card_visa"))
    if operation == "shipping.cancel":
        await partners.shipping.create(saga, [item], None)


async def met_a_fault(stripe: StripeFake, call: Callable[[], Awaitable[Outcome]]) -> Outcome:
    """Make a call; repeat it if it timed out before it met the fault."""

    async def met() -> list[Outcome]:
        outcome = await call()
        return [] if stripe.faults[0].times and stripe.faults[0].kind.startswith("timeout") else [outcome]

    [outcome] = await wait_until(met, AMPLE_SECONDS, "a call that meets the fault")
    return outcome
