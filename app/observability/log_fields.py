"""The fields that every log line of a piece of work has, bound once: request, tenant, order, event, idempotency key.

`bind` lasts until the block of the innermost `bound` ends, or the task. `request_id` is bound by the middleware;
`trace_id` and `span_id` come from the current span. structlog's own context variables do the same, one variable for
each field, which every request and every line paid for.
"""

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType

HASH_CHARACTERS = 12  # enough to find the lines of one key; a key itself may be a credential, so it is not logged

Fields = Mapping[str, str]

_FIELDS: ContextVar[Fields] = ContextVar("log_fields", default=MappingProxyType({}))


def current() -> Fields:
    """Return the fields of the current task."""
    return _FIELDS.get()


def bind(**fields: str) -> None:
    """Add the fields to every further line of the current block or task."""
    _FIELDS.set({**_FIELDS.get(), **fields})


class bound:  # noqa: N801 - used as a function
    """Add the fields to every line inside a block."""

    __slots__ = ("_before", "_fields")
    _before: Token[Fields]

    def __init__(self, **fields: str) -> None:
        self._fields = fields

    def __enter__(self) -> None:
        """Begin the block."""
        self._before = _FIELDS.set({**_FIELDS.get(), **self._fields})

    def __exit__(self, *_: object) -> None:
        """End the block."""
        _FIELDS.reset(self._before)


def hash_key(key: str) -> str:
    """Return how the log shows an idempotency key: `printf %s KEY | sha256sum | cut -c1-12` gives the same."""
    return hashlib.sha256(key.encode()).hexdigest()[:HASH_CHARACTERS]
