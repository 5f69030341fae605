"""`orders load`: load a running service and judge it."""

import asyncio
from typing import Annotated
from urllib.parse import urlsplit

import typer

import load as load_run
from app.cli.options import AsJson
from app.errors import Unavailable

DEFAULT_SANDBOX_PORT = 9000


def load(
    url: Annotated[str, typer.Argument(help="URL of the service, such as http://127.0.0.1:8000.")],
    orders: Annotated[int, typer.Option(min=1, max=1_000_000, help="Keys to send.")] = 1000,
    rate: Annotated[
        float | None, typer.Option(min=0.1, max=100_000, help="Keys per second; default: as fast as the clients go.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, max=1000, help="Clients that send at the same time.")] = 32,
    sandbox: Annotated[
        str | None, typer.Option(help="URL of the partner sandbox; default: port 9000 of the service's host.")
    ] = None,
    settle: Annotated[float, typer.Option(min=0, max=3600, help="Seconds to wait for the ends of all orders.")] = 180,
    token: Annotated[
        str, typer.Option(envvar="ORDERS_LOAD_TOKEN", help="Bearer token with orders:read and orders:write.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Decides which orders are sent, and how their clients behave.")] = 1,
    *,
    as_json: AsJson = False,
) -> None:
    """Send keyed orders from impatient clients, wait for their ends, and judge by the partners' ledger.

    Exit 0: every promise holds. 1: one is violated. 3: it could not be checked.
    """
    address = urlsplit(url)
    if address.scheme not in {"http", "https"} or not address.hostname:
        raise typer.BadParameter("must be an http:// or https:// URL", param_hint="URL")
    config = load_run.LoadConfig(
        urls=[url],
        sandbox_url=sandbox or f"http://{address.hostname}:{DEFAULT_SANDBOX_PORT}",
        orders=orders,
        rate=rate,
        clients=clients,
        settle_seconds=settle,
        token=token,
        seed=seed,
    )
    try:
        verdict = asyncio.run(load_run.run(config))
    except load_run.CannotCheck as error:
        raise Unavailable(str(error)) from error
    typer.echo(load_run.as_json(verdict) if as_json else load_run.as_text(verdict))
    raise typer.Exit({"holds": 0, "violated": 1, "not checked": 3}[verdict.outcome])
