"""The options that operators' commands share, the servers they use, and a connection pool for one command."""

import contextlib
import logging
import os
import pwd
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import typer

from app import db, settings
from app.api import params
from app.demo import embedded_postgres
from app.errors import ConfigurationError
from app.observability import logs
from app.operations.audit import AuditActor

DataDir = Annotated[Path | None, typer.Option(help="Use the database of the demo in this directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaybeReason = Annotated[str | None, typer.Option("--reason", help="The reason, recorded with the action.")]

POOL_SIZE = 2


def servers(data_dir: Path | None) -> tuple[str, str]:
    """Return the URLs of the database and the broker (empty: no broker). Raises ConfigurationError, Unavailable."""
    logs.configure_logging("console", "WARNING")
    logging.getLogger("aiormq").setLevel("CRITICAL")  # the command reports the error itself
    if data_dir is not None:
        try:
            return embedded_postgres.running_url(data_dir), ""
        except OSError as error:
            raise ConfigurationError(f"cannot read {data_dir}: {error.strerror}") from error
    configured = settings.load(settings.Operations)
    return configured.database_url.get_secret_value(), configured.rabbitmq_url.get_secret_value()


@contextlib.asynccontextmanager
async def open_pool(url: str) -> AsyncIterator[db.Pool]:
    """Open a pool to a database with this release's schema. Raises ConfigurationError, DatabaseUnavailable."""
    await db.check(url)
    async with db.open_pool(url, POOL_SIZE) as pool:
        yield pool


def identify_actor(reason: str | None) -> AuditActor:
    """Return the user who runs the command, from the system and not from the environment, and the reason.

    Raises typer.BadParameter.
    """
    user = os.getuid()
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:  # a container may run as a user without a name
        name = str(user)
    try:
        return AuditActor(f"cli:{name}", "" if reason is None else params.parse_reason(reason))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--reason") from error


def parse_duration(text: str, option: str) -> float:
    """Parse seconds, or a number followed by s, m, h or d. Raises typer.BadParameter."""
    try:
        return params.parse_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
