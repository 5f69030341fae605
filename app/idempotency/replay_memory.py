"""Remember responses in this process, by the raw request: a retry that repeats every byte is answered without parsing.

This is safe because a key's row never changes before it expires. A request that equals an earlier one in tenant, key,
method, path, query, content type and body has the same fingerprint, so Postgres would return the same response. A
request that differs in any byte takes the ordinary way. The memory can therefore only be faster, never give another
answer. The response of a key is not used in the last minute of its lifetime, after which another request may take the
key over: the clocks of this process and of Postgres may differ by that much.

Only committed responses are remembered, so an entry needs no other check. Entries and bytes are bounded: the entry that
was used longest ago makes room for a new one.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from app.idempotency.facts import ResponseReplayed, Source
from app.idempotency.key import RawRequest
from app.idempotency.store import StoredResponse
from app.observability.signals import Signals

MAX_ENTRIES = 20_000  # with the usual order, about 20 MiB
MAX_BYTES = 32 * 1024 * 1024
ENTRY_BYTES = 600  # what an entry takes besides its texts
MARGIN_SECONDS = 60.0


class _Entry(NamedTuple):
    response: StoredResponse
    usable_until: float  # of the monotonic clock
    size: int


class ReplayMemory:
    """The responses that this process has given lately. `clock`: monotonic, in seconds."""

    def __init__(
        self,
        signals: Signals,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signals = signals
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[RawRequest, _Entry] = OrderedDict()  # used longest ago first
        self._bytes = 0

    def find(self, request: RawRequest) -> StoredResponse | None:
        """Return the response to the same request, None if it is not remembered or its key is about to expire."""
        entry = self._entries.get(request)
        if entry is None:
            return None
        if entry.usable_until <= self._clock():
            self._forget(request)
            return None
        self._entries.move_to_end(request)
        self._signals.emit(ResponseReplayed(Source.MEMORY))
        return entry.response

    def keep(self, request: RawRequest, response: StoredResponse) -> None:
        """Remember a committed response as a replay. `remaining_seconds` was measured during this request."""
        if request.key is None or response.remaining_seconds <= MARGIN_SECONDS:
            return
        self._forget(request)
        usable_until = self._clock() + response.remaining_seconds - MARGIN_SECONDS
        size = ENTRY_BYTES + len(response.body) + sum(len(part or "") for part in request)
        self._entries[request] = _Entry(replace(response, replayed=True), usable_until, size)
        self._bytes += size
        while self._bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self._forget(next(iter(self._entries)))

    def _forget(self, request: RawRequest) -> None:
        entry = self._entries.pop(request, None)
        if entry is not None:
            self._bytes -= entry.size
