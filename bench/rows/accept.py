"""Accept orders: `POST /orders` with a new key each time, 32 clients, and only the role `api` runs.

The service checks the key, validates the order and commits key, order, line and outbox row before it answers.
"""

import contextlib
from functools import partial

from bench.client import new_keys, orders, saturate
from bench.lab import Lab
from bench.measure import WARM_UP_SECONDS, Meter, observe
from bench.rounds import Comparison, Plan, Window, compare

CLIENTS = 32


async def accept(lab: Lab, plan: Plan) -> Comparison:
    """Compare with FastAPI that stores nothing, and with the usual way to store an order: SQLAlchemy's ORM."""
    async with contextlib.AsyncExitStack() as stack:
        contenders = [
            await stack.enter_async_context(contender)
            for contender in (lab.service(["api"]), lab.floor("fastapi_only"), lab.floor("orm", ROLES="api"))
        ]
        windows: dict[str, Window] = {}
        for contender in contenders:
            load = partial(saturate, contender.port, CLIENTS, orders(new_keys()))
            await load(WARM_UP_SECONDS)
            windows[contender.name] = partial(observe, Meter(lab, contender), partial(load, plan.seconds))
        return await compare("orders accepted", plan, windows)
