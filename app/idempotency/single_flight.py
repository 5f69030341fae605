"""Single flight: of concurrent requests with one key, one per process goes to Postgres; the others share its result.

Without it, a retry storm on one key would fill the connection pool with transactions that wait for each other.
"""

import asyncio
from weakref import WeakValueDictionary

from app.errors import RequestInProgress
from app.idempotency.key import HEADER, IdempotencyKey
from app.idempotency.store import StoredResponse


class InFlight:
    """The current requests of one key in this process. `result`: what the last finished one returned."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.result: tuple[IdempotencyKey, StoredResponse] | None = None

    def leave(self) -> None:
        """Let the next request run."""
        self.lock.release()


class SingleFlight:
    """Lets one request per key through at a time."""

    def __init__(self) -> None:
        # Weak references: an entry exists exactly as long as a request holds it.
        self._inflight: WeakValueDictionary[tuple[str, str], InFlight] = WeakValueDictionary()

    async def join(self, key: IdempotencyKey, wait_seconds: float) -> InFlight:
        """Wait until no other request of this key runs here, and keep others out until `InFlight.leave`.

        Raises RequestInProgress after `wait_seconds`.
        """
        mine = InFlight()
        inflight = self._inflight.setdefault((key.tenant, key.key), mine)
        if inflight is mine:  # no other request has this key
            await inflight.lock.acquire()
            return inflight
        try:
            async with asyncio.timeout(wait_seconds):
                await inflight.lock.acquire()
        except TimeoutError as error:
            raise RequestInProgress(f"the first request with this {HEADER} is still running") from error
        return inflight
