"""`orders openapi` and `orders asyncapi`: the generated documents."""

import json

import typer

from app import main, settings
from app.api import asyncapi as asyncapi_document
from app.bootstrap.consumers import queues


def openapi() -> None:
    """Print the OpenAPI document of the API. A running service serves the same one at /openapi.json."""
    configured = settings.load(settings.Settings, database_url="postgresql://none", roles="api", auth_mode="none")
    typer.echo(json.dumps(main.create_app(configured).openapi(), indent=2, ensure_ascii=False))


def asyncapi() -> None:
    """Print the AsyncAPI document: the messages that the service sends and receives."""
    typer.echo(json.dumps(asyncapi_document.document(queues()), indent=2, ensure_ascii=False))
