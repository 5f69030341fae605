"""The `orders` command.

Exit codes: 0 done; 1 the thing asked for failed or a check found something; 2 usage or configuration; 3 could not
check (a server out of reach).
"""

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from app import bootstrap, db, settings
from app import main as composition
from app.api import asyncapi
from app.api.server import listener as server_listener
from app.auth import tokens
from app.bootstrap.consumers import queues
from app.cli import dlq, outbox, saga
from app.cli.options import duration
from app.demo import embedded_postgres, stack
from app.errors import ConfigurationError, RequestError, Unavailable
from app.observability import logs

app = typer.Typer(
    help="An orders service that never loses an order, never charges twice and never gets stuck in silence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(outbox.app, name="outbox")
app.add_typer(dlq.app, name="dlq")
app.add_typer(saga.app, name="saga")


@app.command()
def serve() -> None:
    """Run the service with the roles in ORDERS_ROLES, until Ctrl-C or SIGTERM."""
    configured = settings.load(settings.Settings)
    logs.configure_logging(configured.log_format, configured.log_level, background=True)
    uvloop.run(server_listener.until_signalled(composition.serve(configured)))


@app.command()
def migrate(
    *,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 1 when the schema is behind.")] = False,
) -> None:
    """Bring the database schema up to this release's."""
    url = settings.load(settings.Database).database_url.get_secret_value()
    logs.configure_logging("console", "WARNING")
    revision = asyncio.run(db.inspect(url))
    if check and db.is_behind(revision):
        typer.echo("the schema is behind this release: run `orders migrate`")
        raise typer.Exit(1)
    if not check:
        db.migrate(url)
    typer.echo("the schema is current")


@app.command(name="sandbox")
def run_sandbox(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 9000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    ledger: Annotated[Path | None, typer.Option(help="SQLite file, kept between runs; default: in memory.")] = None,
) -> None:
    """Run the partner simulator: inventory, payment and shipping, with a ledger of its own and faults on request."""
    logs.configure_logging("console", "INFO", background=True)
    with contextlib.closing(server_listener.listen(host, port)) as listener:
        text = "sandbox on http://{}:{} (Ctrl-C ends it)".format(*listener.getsockname()[:2])
        one = stack.simulator(ledger, listener)
        uvloop.run(
            server_listener.until_signalled(server_listener.run(one, started=lambda: typer.echo(text, err=True)))
        )


@app.command()
def openapi() -> None:
    """Print the API's OpenAPI document, the one that a running service shows at /openapi.json."""
    configured = settings.load(settings.Settings, database_url="postgresql://none", roles="api", auth_mode="none")
    typer.echo(json.dumps(composition.create_app(configured).openapi(), indent=2, ensure_ascii=False))


@app.command(name="asyncapi")
def print_asyncapi() -> None:
    """Print the AsyncAPI document: the messages that the service sends and receives."""
    typer.echo(json.dumps(asyncapi.document(queues()), indent=2, ensure_ascii=False))


@app.command()
def prune(
    data_dir: Annotated[Path | None, typer.Option(help="Of a running demo, whose database it is then.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Remove what is past its retention, in one pass; the role janitor does the same by itself.

    Exits with 1 when a table could not be pruned, and with 3 when Postgres was unavailable for all of them.
    """
    database = {} if data_dir is None else {"database_url": embedded_postgres.running_url(data_dir)}
    logs.configure_logging("console", "CRITICAL")  # a line of ours reports each failure
    removed, failures = uvloop.run(bootstrap.prune(settings.load(settings.Retention, **database)))
    typer.echo(json.dumps(removed) if as_json else "\n".join(f"{rows:>9} {table}" for table, rows in removed.items()))
    for table, error in failures.items():
        typer.echo(f"orders: {table} could not be pruned: {error}", err=True)
    if failures:
        unreachable = len(failures) == len(removed) and all(isinstance(each, Unavailable) for each in failures.values())
        raise typer.Exit(3 if unreachable else 1)


@app.command(name="demo")
def run_demo(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the service.")] = 8000,
    sandbox_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the partner sandbox.")] = 9000,
    data_dir: Annotated[Path, typer.Option(help="Kept between runs.")] = Path(".demo"),
    *,
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="Keep nothing: a fresh directory, removed.")] = False,
) -> None:
    """Run the whole system in one command: real PostgreSQL, in-process transport, the partner sandbox beside it."""
    binaries = os.environ.get(settings.PREFIX + "PG_BIN")
    uvloop.run(
        server_listener.until_signalled(stack.run(port, sandbox_port, None if ephemeral else data_dir, binaries))
    )


@app.command()
def token(
    *,
    tenant: Annotated[str, typer.Option(help="Whose orders it may see.")] = "default",
    subject: Annotated[str, typer.Option(help="Who carries it.")] = "developer",
    scope: Annotated[
        list[str] | None, typer.Option(help="What it allows; again for more. Default: orders:read orders:write.")
    ] = None,
    expires_in: Annotated[str, typer.Option(help="Seconds, or a number with s, m, h or d behind it.")] = "1h",
) -> None:
    """Print one signed development token for a service that shares ORDERS_AUTH_JWT_SECRET."""
    configured = settings.load(settings.Auth)
    secret = configured.auth_jwt_secret.get_secret_value()
    if not secret:
        raise ConfigurationError(f"{settings.PREFIX}AUTH_JWT_SECRET is not set: only a shared secret can sign tokens")
    claims = {
        "sub": subject,
        configured.auth_tenant_claim: tenant,
        "scope": " ".join(scope or ("orders:read", "orders:write")),
        "iss": configured.auth_issuer,
        "aud": configured.auth_audience,
    }
    typer.echo(
        tokens.sign(
            secret, {name: value for name, value in claims.items() if value}, duration(expires_in, "--expires-in")
        )
    )


def main() -> None:
    """Run the command line; every expected error is one line on stderr."""
    _open_standard_files()
    try:
        app()
    except RequestError as error:
        sys.exit(_fail(1, error))
    except ConfigurationError as error:
        sys.exit(_fail(2, error))
    except Unavailable as error:
        sys.exit(_fail(3, error))


def _open_standard_files() -> None:
    """Put /dev/null where a standard file is closed; its number would go to a socket, which the event loop forbids."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _fail(code: int, error: Exception) -> int:
    typer.echo(f"orders: {error}", err=True)
    return code
