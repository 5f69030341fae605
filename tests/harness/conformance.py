"""Hooks for schemathesis (SCHEMATHESIS_HOOKS=tests.harness.conformance)."""

import re
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import schemathesis

from app.api.openapi import KEY as DOCUMENTED_KEY

KEY = "Idempotency-Key"
POSSIBLE = re.compile(r"[!-~]{1,255}")
POSITIVE = schemathesis.GenerationMode.POSITIVE


@schemathesis.hook
def filter_case(_: Any, case: Any) -> bool:
    """Leave out keys that are meant to be good and are not by the document: now and then one ends with U+FFFD.

    Those that are meant to be bad are sent, and must be refused.
    """
    key = (case.path_parameters or {}).get("key")
    meant_well = case.meta is not None and case.meta.generation.mode is POSITIVE
    return key is None or not meant_well or re.fullmatch(DOCUMENTED_KEY, unquote(str(key))) is not None


@schemathesis.hook
def before_call(_: Any, case: Any, __: Any) -> None:
    """Give each good key to one request alone: another request under a known key is rightly refused."""
    if case.headers and POSSIBLE.fullmatch(str(case.headers.get(KEY, ""))):
        case.headers[KEY] = str(uuid4())
