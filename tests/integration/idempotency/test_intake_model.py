"""For any sequence of writes and reads, the service answers as a model of its promise."""

import asyncio
import json
from typing import Any, ClassVar

import asyncpg
import httpx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.harness.api import serving
from tests.harness.wait import AMPLE_SECONDS

KEYS = st.sampled_from(["a", "b", '"c"', "c"])  # the last two are equal
BODIES = [
    {"items": [{"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}]},
    {"sku": "WIDGET", "quantity": 3, "unitPrice": 9.99, "currency": "USD"},  # the first, spelled another way
    {"items": [{"sku": "WIDGET", "quantity": 4, "unit_price": "9.99"}]},
]
MEANINGS = [0, 0, 1]


async def execute(url: str, statement: str) -> None:
    conn = await asyncpg.connect(url)
    await conn.execute(statement)
    await conn.close()


class Callers(RuleBasedStateMachine):
    """Callers of one service; each run has its own."""

    base_url: ClassVar[str]
    database_url: ClassVar[str]
    changes: ClassVar[int] = 0  # of keys by our own SQL, which the service's replay memory cannot notice

    @initialize()
    def begin(self) -> None:
        asyncio.run(execute(self.database_url, "TRUNCATE orders, order_lines, outbox, idempotency_keys CASCADE"))
        self.http = httpx.Client(base_url=self.base_url, timeout=AMPLE_SECONDS, trust_env=False)
        type(self).changes += 1
        self.keys: dict[str, tuple[int, httpx.Response]] = {}
        self.statuses: dict[str, str] = {}

    def teardown(self) -> None:
        if hasattr(self, "http"):
            self.http.close()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = self.http.request(method, path, **options)
        assert response.status_code < 500, response.text
        return response

    @rule(key=KEYS, number=st.sampled_from(range(len(BODIES))))
    def place(self, key: str, number: int) -> None:
        content = json.dumps(BODIES[number]) + " " * self.changes  # so it never was sent before the last change
        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        response = self.send("POST", "/orders", content=content, headers=headers)
        meaning, first = self.keys.get(key.strip('"'), (None, None))
        if first is None:
            assert (response.status_code, "idempotent-replay" in response.headers) == (201, False)
            assert response.json()["id"] not in self.statuses
            self.keys[key.strip('"')] = (MEANINGS[number], response)
            self.statuses[response.json()["id"]] = "pending"
        elif meaning == MEANINGS[number]:
            assert (response.status_code, response.content) == (201, first.content)
            assert response.headers["location"] == first.headers["location"]
            assert response.headers["idempotent-replay"] == "true"
        else:
            assert (response.status_code, response.json()["code"]) == (422, "idempotency-key-reused")

    @rule(number=st.sampled_from(range(len(BODIES))))
    def place_without_a_key(self, number: int) -> None:
        response = self.send("POST", "/orders", json=BODIES[number])
        assert response.status_code == 201
        assert response.json()["id"] not in self.statuses
        self.statuses[response.json()["id"]] = "pending"

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.statuses:
            order_id = data.draw(st.sampled_from(sorted(self.statuses)))
            response = self.send("POST", f"/orders/{order_id}/cancel")
            assert (response.status_code, response.json()["status"]) == (200, "cancelled")
            self.statuses[order_id] = "cancelled"

    @rule(key=KEYS)
    def look_a_key_up(self, key: str) -> None:
        response = self.send("GET", f"/idempotency-keys/{key.strip(chr(34))}")
        _, first = self.keys.get(key.strip('"'), (None, None))
        assert response.status_code == (404 if first is None else 200)
        if first is not None:
            assert response.json()["location"] == first.headers["location"]

    @rule(key=KEYS)
    def let_a_key_end(self, key: str) -> None:
        name = key.strip('"')
        ended = f"UPDATE idempotency_keys SET expires_at = clock_timestamp() WHERE key = '{name}'"  # noqa: S608 - ours
        asyncio.run(execute(self.database_url, ended))
        type(self).changes += 1
        self.keys.pop(name, None)

    @invariant()
    def the_orders_are_those_that_were_answered(self) -> None:
        if hasattr(self, "statuses"):
            listed = self.send("GET", "/orders", params={"limit": 100}).json()["orders"]
            assert {order["id"]: order["status"] for order in listed} == self.statuses


async def test_every_sequence_of_requests_is_answered_as_promised(database_url: str) -> None:
    """Without the roles that start sagas, so that only the callers change orders."""
    examples = settings(max_examples=15, stateful_step_count=30, suppress_health_check=list(HealthCheck))
    async with serving(database_url) as api:
        there = {"base_url": str(api.base_url), "database_url": database_url}
        await asyncio.to_thread(run_state_machine_as_test, type("Here", (Callers,), there), settings=examples)
