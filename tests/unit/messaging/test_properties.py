"""The properties of an event on the wire mean what pamqp's own encoding means."""

from dataclasses import replace

import pytest
from pamqp.commands import Basic

from app.messaging.envelope import Envelope
from app.messaging.rabbitmq.properties import EventProperties
from tests.harness.events import event

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def decoded(encoded: bytes) -> Basic.Properties:
    properties = Basic.Properties()
    properties.unmarshal(int.from_bytes(encoded[:2], "big"), encoded[2:])
    return properties


@pytest.mark.parametrize("tenant", ["acme", "Zoë ✓", "t" * 300])
@pytest.mark.parametrize("traceparent", [None, TRACE])
def test_a_reader_gets_every_property(tenant: str, traceparent: str | None) -> None:
    sent = replace(event(), tenant=tenant, traceparent=traceparent)
    assert decoded(EventProperties(sent).marshal()) == Basic.Properties(
        content_type="application/json",
        headers=dict(sent.headers()),
        delivery_mode=2,
        message_id=str(sent.id),
        timestamp=sent.time.replace(microsecond=0),
        message_type=sent.type,
    )


@pytest.mark.parametrize("wrong", [replace(event(), type="t" * 256), replace(event(), tenant="\ud800")])
def test_what_cannot_be_encoded_is_an_error(wrong: Envelope) -> None:
    """The batch makes a refusal of it: retrying cannot help."""
    with pytest.raises(ValueError, match=r"longer than 255 bytes|surrogates not allowed"):
        EventProperties(wrong)
