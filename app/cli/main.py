"""The `orders` command: its groups and its exit codes.

0: done. 1: the request failed, or a check found something. 2: usage or configuration. 3: could not check, because a
server is unavailable.
"""

import os
import sys

import typer

from app.cli import audit, demo, dlq, documents, load, migrate, outbox, partners, sagas, serve, token, verify
from app.errors import ConfigurationError, RequestError, Unavailable

app = typer.Typer(
    help="An orders service that never loses an order, never charges twice and never gets stuck silently.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(outbox.app, name="outbox")
app.add_typer(dlq.app, name="dlq")
app.add_typer(sagas.app, name="saga")
app.add_typer(partners.app, name="partner")
app.command()(audit.audit)
app.command()(serve.serve)
app.command()(migrate.migrate)
app.command()(demo.sandbox)
app.command()(documents.openapi)
app.command()(documents.asyncapi)
app.command()(verify.verify)
app.command()(migrate.prune)
app.command()(demo.demo)
app.command()(token.token)
app.command()(load.load)


def main() -> None:
    """Run the command line; report every expected error in one line on stderr."""
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
    """Open /dev/null for each closed standard file: a socket would get its number, which the event loop forbids."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _fail(code: int, error: Exception) -> int:
    typer.echo(f"orders: {error}", err=True)
    return code
