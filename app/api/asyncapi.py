"""The AsyncAPI 3 document: the messages that the service sends and receives over RabbitMQ.

Names come from the modules that use them. The schema of an order is the model of the HTTP responses: an event's data is
the order as `GET /orders/{id}` would have shown it at that moment.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from app.api import openapi
from app.api.orders.schemas import OrderAnswer
from app.messaging.envelope import CONTENT_TYPE, HEADER_PREFIX, SOURCE, SPEC_VERSION
from app.messaging.topology import DEAD_LETTER_EXCHANGE, DELIVERY_LIMIT, EXCHANGE, QueueSpec, routing_key
from app.observability.traces import TRACESTATE_BYTES
from app.orders.events import TYPES
from app.orders.model import Reason, Status

Json = dict[str, Any]

BINDING_VERSION = "0.3.0"
SUMMARIES: Mapping[Status, str] = {
    Status.PENDING: "An order was placed. It is durable, and its saga is about to start.",
    Status.CONFIRMED: "An order is complete: stock sold, card charged, shipment created.",
    Status.REJECTED: "An order failed for the reason in `status_reason`, and every step is undone.",
    Status.CANCELLED: "An order was cancelled, and every step is undone.",
}
DESCRIPTION = """\
Events of orders, as CloudEvents 1.0 in binary mode: attributes in headers, the data as JSON in the body.

A message may be delivered more than once, always with the same id. A late duplicate may arrive after newer events, so
compare `cloudEvents_sequence`, the order's version. First deliveries of one order's events arrive in order. New fields
may be added to the data at any time; a change that would break readers becomes a new type."""


def document(queues: Sequence[QueueSpec]) -> Json:
    """Return the document. `queues`: the queues that the service consumes."""
    kinds = {status: _name(kind) for status, kind in TYPES.items()}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Orders",
            "version": openapi.VERSION,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            "rabbitmq": {
                "host": "{broker}",
                "protocol": "amqp",
                "protocolVersion": "0-9-1",
                "description": "The broker in `ORDERS_RABBITMQ_URL`. Without it no message leaves the process.",
                "variables": {"broker": {"default": "localhost:5672"}},
            }
        },
        "channels": {name: _describe_event_channel(status) for status, name in kinds.items()}
        | _describe_queues(queues),
        "operations": {
            **{f"tell_{name}": _describe_operation("send", name, name) for name in kinds.values()},
            **_describe_consuming(queues),
        },
        "components": {
            "messages": {name: _describe_event(status) for status, name in kinds.items()}
            | {"dead_letter": _describe_dead_letter()},
            "schemas": {"order": openapi.self_contained_schema(OrderAnswer)},
        },
    }


def _describe_consuming(queues: Sequence[QueueSpec]) -> Json:
    operations = {}
    for queue in queues:
        suffix = "" if queue == queues[0] else f"_{queue.consumer}"
        names = [_name(event_type) for event_type in queue.event_types]
        operations[f"start_{queue.consumer}"] = _describe_operation("receive", queue.consumer, *names)
        operations[f"set_aside{suffix}"] = _describe_operation("send", _name_dead_letters(queue, queues), "dead_letter")
    return operations


def _name(kind: str) -> str:
    """Return the name of a message: `order_placed` for `orders.order.placed.v1`."""
    return "_".join(kind.split(".")[1:3])


def _routing_key(status: Status) -> str:
    return routing_key(TYPES[status])


def _describe_event_channel(status: Status) -> Json:
    return _describe_channel(
        _routing_key(status),
        [_name(TYPES[status])],
        f"Bind a queue of your own to the exchange `{EXCHANGE}` with this routing key.",
        {"is": "routingKey", "exchange": {"name": EXCHANGE, "type": "topic", "durable": True, "autoDelete": False}},
    )


MANDATORY = {"order_placed", "dead_letter"}  # the broker returns these if no queue takes them


def _describe_queues(queues: Sequence[QueueSpec]) -> Json:
    durable = {"durable": True, "exclusive": False, "autoDelete": False}
    channels = {}
    for queue in queues:
        keys = ", ".join(f"`{key}`" for key in queue.routing_keys)
        channels[queue.consumer] = _describe_channel(
            queue.name,
            [_name(event_type) for event_type in queue.event_types],
            f"The service's own queue: a quorum queue, bound to `{EXCHANGE}` with {keys}."
            f" After {DELIVERY_LIMIT} deliveries without an acknowledgement the broker itself dead-letters a message.",
            {"is": "queue", "queue": {"name": queue.name, **durable}},
        )
        channels[_name_dead_letters(queue, queues)] = _describe_channel(
            queue.dead_letter_queue,
            ["dead_letter"],
            "Messages that could not be handled wait here for an operator: a quorum queue, bound to the direct exchange"
            f" `{DEAD_LETTER_EXCHANGE}` with `{queue.name}`.",
            {"is": "queue", "queue": {"name": queue.dead_letter_queue, **durable}},
        )
    return channels


def _name_dead_letters(queue: QueueSpec, queues: Sequence[QueueSpec]) -> str:
    """Return the name of the channel of a queue's dead letters."""
    return "dead_letters" if queue == queues[0] else f"{queue.consumer}_dead_letters"


def _describe_channel(address: str, messages: Sequence[str], description: str, binding: Json) -> Json:
    return {
        "address": address,
        "description": description,
        "messages": {message: {"$ref": f"#/components/messages/{message}"} for message in messages},
        "bindings": {"amqp": binding | {"bindingVersion": BINDING_VERSION}},
    }


def _describe_operation(action: str, channel: str, *messages: str) -> Json:
    is_mandatory = not MANDATORY.isdisjoint(messages)
    binding = {"deliveryMode": 2, "mandatory": is_mandatory} if action == "send" else {"ack": True}
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{message}"} for message in messages],
        "bindings": {"amqp": binding | {"bindingVersion": BINDING_VERSION}},
    }


def _describe_event(status: Status) -> Json:
    return {
        "name": TYPES[status],
        "title": _routing_key(status),
        "summary": SUMMARIES[status],
        "contentType": CONTENT_TYPE,
        "headers": _describe_headers(TYPES[status]),
        "payload": {
            "allOf": [{"$ref": "#/components/schemas/order"}, {"properties": {"status": {"const": status.value}}}]
        },
        "bindings": {"amqp": {"messageType": TYPES[status], "bindingVersion": BINDING_VERSION}},
        "examples": [_make_example(status)],
    }


def _describe_headers(kind: str) -> Json:
    attributes: dict[str, Json] = {
        "specversion": {"type": "string", "const": SPEC_VERSION},
        "id": {"type": "string", "format": "uuid", "description": "the same for every delivery; also the `message_id`"},
        "source": {"type": "string", "const": SOURCE},
        "type": {"type": "string", "const": kind},
        "subject": {"type": "string", "format": "uuid", "description": "the order"},
        "time": {"type": "string", "format": "date-time", "description": "when it happened, in UTC"},
        "sequence": {"type": "string", "pattern": "^[1-9][0-9]*$", "description": "the order's version"},
        "tenant": {"type": "string", "minLength": 1, "description": "the tenant that owns the order"},
    }
    named = {HEADER_PREFIX + name: schema for name, schema in attributes.items()}
    trace: dict[str, Json] = {
        "traceparent": {"type": "string", "description": "W3C Trace Context"},
        "tracestate": {"type": "string", "description": "W3C Trace Context", "maxLength": TRACESTATE_BYTES},
    }
    return {"type": "object", "required": list(named), "properties": named | trace}


def _describe_dead_letter() -> Json:
    instant = {"type": "string", "format": "date-time"}
    reasons: dict[str, Json] = {
        "x-reason": {"type": "string", "description": "the reason, in one line"},
        "x-attempts": {"type": "integer", "minimum": 1, "description": "the number of attempts"},
        "x-first-failure-at": instant,
        "x-last-failure-at": instant,
    }
    headers = {
        "type": "object",
        "description": "The original headers, and these; or `x-death` if the broker itself dead-lettered the message.",
        "properties": reasons,
        "anyOf": [{"required": list(reasons)}, {"required": ["x-death"]}],
    }
    example = {"x-reason": "unknown type orders.order.placed.v9", "x-attempts": 1}
    at = dict.fromkeys(("x-first-failure-at", "x-last-failure-at"), "2026-11-21T03:47:27.401020+00:00")
    return {
        "name": "dead_letter",
        "title": "dead letter",
        "summary": "A message that could not be handled: unchanged, with the reason in its headers.",
        "headers": headers,
        "payload": {},
        "examples": [{"headers": example | at, "payload": {}}],
    }


def _make_example(status: Status) -> Json:
    order = openapi.ORDER
    unfinished = {"version": 1, "updated_at": order["placed_at"], "tracking_id": None}
    changes: Mapping[Status, Json] = {
        Status.PENDING: unfinished,
        Status.CONFIRMED: {},
        Status.REJECTED: {"version": 3, "tracking_id": None, "status_reason": Reason.CARD_DECLINED.value},
        Status.CANCELLED: {"version": 3, "tracking_id": None, "status_reason": Reason.CANCELLED_BY_CUSTOMER.value},
    }
    data = {**order, "status": status.value, **changes[status]}
    attributes = {
        "specversion": SPEC_VERSION,
        "id": order["id"] if status is Status.PENDING else "01890a5d-ae2b-7d3c-8f65-0d1c0e9a7b42",
        "source": SOURCE,
        "type": TYPES[status],
        "subject": order["id"],
        "time": data["updated_at"],
        "sequence": str(data["version"]),
        "tenant": "default",
    }
    return {"headers": {HEADER_PREFIX + name: value for name, value in attributes.items()}, "payload": data}
