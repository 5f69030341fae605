"""The document tells of every status, header and parameter, with examples that are true to their models."""

from typing import Any

import pytest
from pydantic import TypeAdapter

from app.api.cursors import read_cursor
from app.api.operators import StatsAnswer
from app.api.queries import Limited, ListOrders, ListSagas, PeekDeadLetters
from app.api.reading import OrdersAnswer
from app.api.saga_views import SagaAnswer, SagasAnswer
from app.api.schemas import OrderAnswer, Problem
from app.api.views import DeadLettersAnswer, OutboxAnswer
from app.main import create_app
from app.settings import Settings, load

ROUTES: dict[str, tuple[type, set[str], set[str]]] = {
    "/orders": (OrdersAnswer, {"200", "401", "403", "422", "429", "500", "503"}, set(ListOrders.model_fields)),
    "/orders/{order_id}": (
        OrderAnswer,
        {"200", "304", "401", "403", "404", "422", "429", "500", "503"},
        {"order_id", "If-None-Match", "Prefer"},
    ),
    "/ops/outbox": (OutboxAnswer, {"200", "401", "403", "404", "422", "429", "500", "503"}, set(Limited.model_fields)),
    "/ops/dlq": (
        DeadLettersAnswer,
        {"200", "401", "403", "404", "409", "422", "429", "500", "503"},
        set(PeekDeadLetters.model_fields),
    ),
    "/ops/sagas": (SagasAnswer, {"200", "401", "403", "404", "422", "429", "500", "503"}, set(ListSagas.model_fields)),
    "/ops/sagas/{order_id}": (SagaAnswer, {"200", "401", "403", "404", "422", "429", "500", "503"}, {"order_id"}),
    "/ops/stats": (StatsAnswer, {"200", "401", "403", "404", "429", "500", "503"}, set()),
}


@pytest.fixture(scope="module")
def paths() -> dict[str, Any]:
    settings = load(Settings, database_url="postgresql://none", roles="api")
    found: dict[str, Any] = create_app(settings).openapi()["paths"]
    return found


@pytest.mark.parametrize("path", ROUTES)
def test_every_status_and_parameter_of_a_reading_route_is_documented(paths: dict[str, Any], path: str) -> None:
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
def test_every_example_is_true_to_its_model(paths: dict[str, Any], path: str) -> None:
    model, _, _ = ROUTES[path]
    for status, response in paths[path]["get"]["responses"].items():
        assert "X-Request-ID" in response["headers"]
        for media_type, content in response.get("content", {}).items():
            assert media_type == ("application/json" if status == "200" else "application/problem+json")
            TypeAdapter(model if status == "200" else Problem).validate_json(_json(content["example"]))
            assert content["schema"]


def _json(value: object) -> bytes:
    return TypeAdapter(Any).dump_json(value)


def test_an_order_is_documented_with_its_etag_and_a_refused_operator_with_the_challenge(paths: dict[str, Any]) -> None:
    order = paths["/orders/{order_id}"]["get"]["responses"]
    for status in ("200", "304"):
        assert {"ETag", "Cache-Control", "Vary", "Preference-Applied"} <= set(order[status]["headers"])
    assert "content" not in order["304"]
    stats = paths["/ops/stats"]["get"]
    assert "WWW-Authenticate" in stats["responses"]["401"]["headers"]
    assert "Retry-After" in stats["responses"]["503"]["headers"]
    assert stats["security"] == [{"operator": []}]


def test_the_example_of_a_cursor_is_one(paths: dict[str, Any]) -> None:
    example = paths["/orders"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert str(read_cursor(example["next_cursor"]).id) == example["orders"][0]["id"]
