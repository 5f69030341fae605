"""The document lists every status, header and parameter, with valid examples."""

import json
import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from app.api.ops.actions import ListActions
from app.api.ops.dlq import PeekDeadLetters
from app.api.ops.outbox import ListOutbox
from app.api.ops.sagas import ListSagas
from app.api.orders.cursors import read_cursor
from app.api.orders.listing import ListOrders, OrdersAnswer
from app.api.orders.schemas import OrderAnswer
from app.api.problems import Problem
from app.main import create_app
from app.operations.audit_views import ActionsAnswer
from app.operations.dead_letter_views import DeadLettersAnswer
from app.operations.outbox import OutboxAnswer
from app.operations.partner_views import PartnersAnswer
from app.operations.saga_views import SagaAnswer, SagasAnswer
from app.operations.stats import StatsAnswer
from app.settings import Settings, load

ROUTES: dict[str, tuple[type, set[str], set[str]]] = {
    "/orders": (OrdersAnswer, {"200", "401", "403", "422", "429", "500", "503"}, set(ListOrders.model_fields)),
    "/orders/{order_id}": (
        OrderAnswer,
        {"200", "304", "401", "403", "404", "422", "429", "500", "503"},
        {"order_id", "If-None-Match", "Prefer"},
    ),
    "/ops/outbox": (
        OutboxAnswer,
        {"200", "401", "403", "404", "422", "429", "500", "503"},
        set(ListOutbox.model_fields),
    ),
    "/ops/dlq": (
        DeadLettersAnswer,
        {"200", "401", "403", "404", "409", "422", "429", "500", "503"},
        set(PeekDeadLetters.model_fields),
    ),
    "/ops/sagas": (SagasAnswer, {"200", "401", "403", "404", "422", "429", "500", "503"}, set(ListSagas.model_fields)),
    "/ops/sagas/{order_id}": (SagaAnswer, {"200", "401", "403", "404", "422", "429", "500", "503"}, {"order_id"}),
    "/ops/actions": (
        ActionsAnswer,
        {"200", "401", "403", "404", "422", "429", "500", "503"},
        set(ListActions.model_fields),
    ),
    "/ops/partners": (PartnersAnswer, {"200", "401", "403", "404", "422", "429", "500", "503"}, set()),
    "/ops/stats": (StatsAnswer, {"200", "401", "403", "404", "429", "500", "503"}, set()),
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(load(Settings, database_url="postgresql://none", roles="api")).openapi()


@pytest.fixture(scope="module")
def paths(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"]
    return found


@pytest.mark.parametrize("path", ROUTES)
def test_reading_routes_are_fully_documented(paths: dict[str, Any], path: str) -> None:
    """Each reading route has all its statuses, parameters and a description."""
    _, statuses, parameters = ROUTES[path]
    route = paths[path]["get"]
    assert set(route["responses"]) == statuses
    documented = route.get("parameters", [])
    assert {each["name"] for each in documented} == parameters
    assert len(documented) == len(parameters)
    assert all("description" in each or each["in"] == "path" for each in documented)
    assert route["summary"]
    assert route["description"]


@pytest.mark.parametrize("path", ROUTES)
def test_every_example_is_valid(paths: dict[str, Any], path: str) -> None:
    """Examples match the models of their responses."""
    model, _, _ = ROUTES[path]
    for status, response in paths[path]["get"]["responses"].items():
        assert "X-Request-ID" in response["headers"]
        for media_type, content in response.get("content", {}).items():
            assert media_type == ("application/json" if status == "200" else "application/problem+json")
            TypeAdapter(model if status == "200" else Problem).validate_json(_json(content["example"]))
            assert content["schema"]


def _json(value: object) -> bytes:
    return TypeAdapter(Any).dump_json(value)


def test_response_headers_are_documented(paths: dict[str, Any]) -> None:
    """An order has its ETag, and a refused operator the challenge."""
    order = paths["/orders/{order_id}"]["get"]["responses"]
    for status in ("200", "304"):
        assert {"ETag", "Cache-Control", "Vary", "Preference-Applied"} <= set(order[status]["headers"])
    assert "content" not in order["304"]
    stats = paths["/ops/stats"]["get"]
    assert "WWW-Authenticate" in stats["responses"]["401"]["headers"]
    assert "Retry-After" in stats["responses"]["503"]["headers"]
    assert stats["security"] == [{"operator": []}]


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every operation, by its method and path."""
    return {
        f"{method} {path}": operation for path, each in document["paths"].items() for method, operation in each.items()
    }


def test_every_operation_has_a_short_unique_id(operations: dict[str, dict[str, Any]]) -> None:
    """Generated clients use the ids as method names."""
    ids = [operation["operationId"] for operation in operations.values()]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z]+([A-Z][a-z]+)+", name)] == []
    assert {"placeOrder", "getOrder", "listOrders", "cancelOrder"} < set(ids)


def test_every_guarded_operation_names_its_scheme(
    document: dict[str, Any], operations: dict[str, dict[str, Any]]
) -> None:
    """Routes for orders name the tenant's token, routes below `/ops` the operator's."""
    schemes = {
        name: [scheme for choice in operation.get("security", []) for scheme in choice]
        for name, operation in operations.items()
    }
    for name, found in schemes.items():
        path = name.split()[1]
        expected = "operator" if path.startswith("/ops") else "tenant" if path.startswith(("/orders", "/idem")) else ""
        assert found == ([expected] if expected else []), name
    assert set(document["components"]["securitySchemes"]) == {"operator", "tenant"}


def test_every_schema_is_used(document: dict[str, Any]) -> None:
    """The document has no unused and no missing component."""
    text = json.dumps(document)
    names = document["components"]["schemas"]
    assert "Problem" in names
    assert [name for name in names if f'"#/components/schemas/{name}"' not in text] == []
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) == set(names)


def test_a_final_conflict_has_no_retry_after(operations: dict[str, dict[str, Any]]) -> None:
    """Only conflicts that a retry can resolve have the header."""
    assert "Retry-After" not in operations["post /ops/sagas/{order_id}/retry"]["responses"]["409"]["headers"]
    assert "Retry-After" in operations["post /orders"]["responses"]["409"]["headers"]


def test_the_example_of_a_cursor_is_valid(paths: dict[str, Any]) -> None:
    """The example points to the order it is shown with."""
    example = paths["/orders"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert str(read_cursor(example["next_cursor"]).id) == example["orders"][0]["id"]


def test_every_parameter_of_a_listing_is_optional(paths: dict[str, Any]) -> None:
    """Each is described, may be left out, and is never null: a query string cannot say null."""
    parameters = paths["/orders"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == list(ListOrders.model_fields)
    assert all(parameter["description"] and not parameter["required"] for parameter in parameters)
    types = {parameter["name"]: parameter["schema"]["type"] for parameter in parameters}
    assert types == dict.fromkeys(ListOrders.model_fields, "string") | {"limit": "integer"}
