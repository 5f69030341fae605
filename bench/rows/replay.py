"""Replay responses: `POST /orders` with keys that have a response, 32 clients, and only the role `api` runs.

The service has copies of finished responses in Redis, and checks that the request is the same as the first one. The
peer does not check it. The floor neither knows keys nor stores anything.
"""

import contextlib
import itertools
from functools import partial

from bench.client import new_keys, orders, saturate, send_each
from bench.lab import Lab
from bench.measure import Meter, observe
from bench.rounds import Comparison, Plan, Window, compare

CLIENTS = 32
MANY = 10_000


async def replay_one(lab: Lab, plan: Plan) -> Comparison:
    """Replay the response of one key."""
    return await _replay(lab, plan, 1)


async def replay_many(lab: Lab, plan: Plan) -> Comparison:
    """Replay the responses of many keys in turn."""
    return await _replay(lab, plan, 100 if plan.smoke else MANY)


async def _replay(lab: Lab, plan: Plan, count: int) -> Comparison:
    async with contextlib.AsyncExitStack() as stack:
        contenders = [
            await stack.enter_async_context(contender)
            for contender in (lab.service(["api"]), lab.floor("fastapi_only"), lab.peer("idempotency_header"))
        ]
        windows: dict[str, Window] = {}
        for contender in contenders:
            requests = list(itertools.islice(orders(new_keys()), count))
            await send_each(contender.port, CLIENTS, requests)
            load = partial(saturate, contender.port, CLIENTS, itertools.cycle(requests), plan.seconds)
            windows[contender.name] = partial(observe, Meter(lab, contender), load)
        return await compare("responses replayed", plan, windows)
