"""Validate messages by the AsyncAPI document."""

from typing import Any

import jsonschema_rs

from app.api.asyncapi import document
from app.bootstrap.consumers import queues

DOCUMENT = document(queues())
MESSAGES: dict[str, Any] = DOCUMENT["components"]["messages"]


def resolve(reference: str) -> Any:
    """Return the target of a reference. Raises KeyError if there is none."""
    found: Any = DOCUMENT
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def check(name: str, headers: Any, payload: Any) -> None:
    """Validate a message by the document. Raises jsonschema_rs.ValidationError."""
    message = MESSAGES[name]
    for schema, instance in ((message["headers"], headers), (message["payload"], payload)):
        whole = {**schema, "components": DOCUMENT["components"]}  # which the references are about
        jsonschema_rs.validator_for(whole, validate_formats=True).validate(instance)
