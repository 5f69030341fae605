"""The AsyncAPI document is consistent: references resolve, examples are valid, and every event is described."""

from typing import Any

import jsonschema_rs
import pytest

from app.api.asyncapi import document
from app.bootstrap.consumers import queues
from app.orders.events import TYPES
from tests.harness.asyncapi import MESSAGES, check, resolve

DOCUMENT = document(queues())


def references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [found for part in value for found in references(part)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if "$ref" in value else []
    return own + [found for part in value.values() for found in references(part)]


def test_every_reference_resolves() -> None:
    """No `$ref` is dangling."""
    found = references(DOCUMENT)
    assert found
    assert all(resolve(reference) for reference in found)


def test_every_event_type_has_a_channel() -> None:
    """Each event type has a message and a channel of its own."""
    described = {message["name"] for message in MESSAGES.values()}
    assert described == {*TYPES.values(), "dead_letter"}
    sent = {each["channel"]["$ref"] for each in DOCUMENT["operations"].values() if each["action"] == "send"}
    assert len(sent) == len(described)


def test_operations_use_messages_of_their_channel() -> None:
    """Each message of an operation belongs to its channel."""
    for operation in DOCUMENT["operations"].values():
        channel = operation["channel"]["$ref"]
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")


@pytest.mark.parametrize("name", MESSAGES)
def test_every_example_is_valid(name: str) -> None:
    """Examples match the schemas of headers and payload."""
    for example in MESSAGES[name]["examples"]:
        check(name, example["headers"], example["payload"])


@pytest.mark.parametrize("name", sorted(set(MESSAGES) - {"dead_letter"}))
def test_an_invalid_event_does_not_match(name: str) -> None:
    """A changed event fails the schema of its type."""
    [example] = MESSAGES[name]["examples"]
    for attribute in set(example["headers"]):
        with pytest.raises(jsonschema_rs.ValidationError):
            check(
                name, {key: value for key, value in example["headers"].items() if key != attribute}, example["payload"]
            )
    for changed in ({"status": "compensating"}, {"version": "1"}, {"items": None}):
        with pytest.raises(jsonschema_rs.ValidationError):
            check(name, example["headers"], example["payload"] | changed)
