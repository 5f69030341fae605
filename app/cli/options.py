"""What the commands for operators share: where the servers are, how durations are written, a pool for one command."""

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

DataDir = Annotated[Path | None, typer.Option(help="Take the database of the demo that runs on this directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaybeReason = Annotated[str | None, typer.Option("--reason", help="Why; it is kept with what was done.")]

POOL_SIZE = 2


def servers(data_dir: Path | None) -> tuple[str, str]:
    """Return the URLs of database and broker, the latter empty without one. Raises ConfigurationError, Unavailable."""
    logs.configure_logging("console", "WARNING")
    logging.getLogger("aiormq").setLevel("CRITICAL")  # what it has to say of an error is in our own one line
    if data_dir is not None:
        try:
            return embedded_postgres.running_url(data_dir), ""
        except OSError as error:
            raise ConfigurationError(f"cannot read {data_dir}: {error.strerror}") from error
    configured = settings.load(settings.Operations)
    return configured.database_url.get_secret_value(), configured.rabbitmq_url.get_secret_value()


@contextlib.asynccontextmanager
async def open_pool(url: str) -> AsyncIterator[db.Pool]:
    """Lend connections to a database with this release's schema. Raises ConfigurationError, DatabaseUnavailable."""
    await db.check(url)
    async with db.open_pool(url, POOL_SIZE) as pool:
        yield pool


def actor(reason: str | None) -> AuditActor:
    """Return who runs the command, by the system and not by the environment, and why. Raises typer.BadParameter."""
    user = os.getuid()
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:  # a container that runs as any number
        name = str(user)
    try:
        return AuditActor(f"cli:{name}", "" if reason is None else params.reason(reason))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--reason") from error


def duration(text: str, option: str) -> float:
    """Read seconds, or a number with s, m, h or d behind it. Raises typer.BadParameter."""
    try:
        return params.seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
