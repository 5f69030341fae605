"""The AsyncAPI document holds together: references lead somewhere, examples are true, and nothing is left out."""

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


def test_every_reference_leads_to_something() -> None:
    found = references(DOCUMENT)
    assert found
    assert all(resolve(reference) for reference in found)


def test_every_type_of_event_is_described_and_sent_over_a_channel_of_its_own() -> None:
    described = {message["name"] for message in MESSAGES.values()}
    assert described == {*TYPES.values(), "dead_letter"}
    sent = {each["channel"]["$ref"] for each in DOCUMENT["operations"].values() if each["action"] == "send"}
    assert len(sent) == len(described)


def test_operations_speak_of_messages_that_their_channel_has() -> None:
    for operation in DOCUMENT["operations"].values():
        channel = operation["channel"]["$ref"]
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")


@pytest.mark.parametrize("name", MESSAGES)
def test_every_example_is_true_to_its_schemas(name: str) -> None:
    for example in MESSAGES[name]["examples"]:
        check(name, example["headers"], example["payload"])


@pytest.mark.parametrize("name", sorted(set(MESSAGES) - {"dead_letter"}))
def test_what_is_not_such_an_event_is_told_from_it(name: str) -> None:
    [example] = MESSAGES[name]["examples"]
    for attribute in set(example["headers"]):
        with pytest.raises(jsonschema_rs.ValidationError):
            check(
                name, {key: value for key, value in example["headers"].items() if key != attribute}, example["payload"]
            )
    for changed in ({"status": "compensating"}, {"version": "1"}, {"items": None}):
        with pytest.raises(jsonschema_rs.ValidationError):
            check(name, example["headers"], example["payload"] | changed)
