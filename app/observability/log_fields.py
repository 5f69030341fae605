"""The fields that every log line of a piece of work has, bound once: request, tenant, order, event, idempotency key.

`bind` lasts until the task ends, `bound` until its block ends. `request_id` is bound by the middleware; `trace_id` and
`span_id` come from the current span.
"""

import contextlib
import hashlib

import structlog

HASH_CHARACTERS = 12  # enough to find the lines of one key; a key itself may be a credential, so it is not logged


def bind(**fields: str) -> None:
    """Add the fields to every further line of the current task."""
    structlog.contextvars.bind_contextvars(**fields)


def bound(**fields: str) -> contextlib.AbstractContextManager[None]:
    """Add the fields to every line inside a block."""
    return structlog.contextvars.bound_contextvars(**fields)


def hash_key(key: str) -> str:
    """Return how the log shows an idempotency key: `printf %s KEY | sha256sum | cut -c1-12` gives the same."""
    return hashlib.sha256(key.encode()).hexdigest()[:HASH_CHARACTERS]
