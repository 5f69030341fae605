"""The AsyncAPI document as a judge of messages."""

from typing import Any

import jsonschema_rs

from app.api.asyncapi import document
from app.bootstrap.consumers import queues

DOCUMENT = document(queues())
MESSAGES: dict[str, Any] = DOCUMENT["components"]["messages"]


def resolve(reference: str) -> Any:
    """Return what the reference leads to. KeyError: nothing."""
    found: Any = DOCUMENT
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def check(name: str, headers: Any, payload: Any) -> None:
    """Hold a message to the document. Raises jsonschema_rs.ValidationError."""
    message = MESSAGES[name]
    for schema, instance in ((message["headers"], headers), (message["payload"], payload)):
        whole = {**schema, "components": DOCUMENT["components"]}  # which the references are about
        jsonschema_rs.validator_for(whole, validate_formats=True).validate(instance)
