"""Hooks for schemathesis (SCHEMATHESIS_HOOKS=tests.harness.conformance)."""

import re
from typing import Any
from uuid import uuid4

import schemathesis

KEY = "Idempotency-Key"
POSSIBLE = re.compile(r"[!-~]{1,255}")


@schemathesis.hook
def before_call(_: Any, case: Any, __: Any) -> None:
    """Give each good key to one request alone: another request under a known key is rightly refused."""
    if case.headers and POSSIBLE.fullmatch(str(case.headers.get(KEY, ""))):
        case.headers[KEY] = str(uuid4())
