"""A caller's trace context goes along with an order, but never so much of it that a partner refuses the call."""

from dataclasses import replace

import httpx

from app.db import Pool
from app.messaging.envelope import parse
from app.observability.traces import trace_headers
from app.partners.ports import ChargeRequest, Outcome, Payment
from tests.harness.messages import listen, next_message, open_channel, publishing
from tests.harness.orders import event_of, placed, start_saga
from tests.harness.sagas import Stage

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LONG = "long=" + "x" * 200
MEMBERS = [f"vendor{number}={'v' * 90}" for number in range(31)]
OVERSIZED = ",".join([LONG, *MEMBERS])  # 3 KB; a header limit of 8 KB is a few such members away
LIMITED = ",".join(MEMBERS[:5])


async def test_an_oversized_tracestate_is_stored_short(api: httpx.AsyncClient, pool: Pool) -> None:
    """Members over 128 bytes go first, then members from the end; several headers count as one."""
    headers = [("traceparent", TRACEPARENT), ("tracestate", LONG), ("tracestate", ",".join(MEMBERS))]
    answer = await api.post("/orders", json={"sku": "WIDGET", "quantity": 1, "unit_price": 1}, headers=headers)
    assert answer.status_code == 201
    row = await pool.fetchrow("SELECT traceparent, tracestate FROM outbox")
    assert tuple(row or ()) == (TRACEPARENT, LIMITED)


async def test_an_oversized_tracestate_is_published_short(pool: Pool, rabbitmq_url: str) -> None:
    """An earlier release may have stored it, another publisher may send it."""
    event = event_of(await placed(pool), traceparent=TRACEPARENT, tracestate=OVERSIZED)
    async with open_channel(rabbitmq_url) as channel, publishing(rabbitmq_url) as transport:
        queue = await listen(channel, event.routing_key)
        await transport.publish([event])
        message = await next_message(channel, queue.name)
    assert message.headers["tracestate"] == LIMITED
    received = parse({**message.headers, "tracestate": OVERSIZED}, message.body)
    assert received == replace(event, tracestate=LIMITED, data=received.data)


class RecordingPayment:
    """The payment partner, which keeps the trace headers that each call would carry."""

    def __init__(self, payment: Payment) -> None:
        self._payment = payment
        self.seen: list[dict[str, str]] = []

    async def charge(self, charge: ChargeRequest) -> Outcome:
        self.seen.append(trace_headers())
        return await self._payment.charge(charge)

    async def refund(self, charge: ChargeRequest) -> Outcome:
        self.seen.append(trace_headers())
        return await self._payment.refund(charge)


async def test_a_partner_gets_a_short_tracestate(stage: Stage) -> None:
    """Also from a saga whose row an earlier release wrote."""
    saga = await start_saga(stage.pool, trace={"traceparent": TRACEPARENT})
    await stage.pool.execute("UPDATE sagas SET traceparent = $1, tracestate = $2", TRACEPARENT, OVERSIZED)
    payment = RecordingPayment(stage.partners.payment)
    await stage.drive(stage.orchestrator(payment=payment))
    assert await stage.outcome(saga) == "confirmed"
    assert payment.seen == [{"traceparent": TRACEPARENT, "tracestate": LIMITED}]
