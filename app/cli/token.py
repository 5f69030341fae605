"""`orders token`: a development token."""

from typing import Annotated

import typer

from app import settings
from app.auth import tokens
from app.cli.options import parse_duration
from app.errors import ConfigurationError


def token(
    *,
    tenant: Annotated[str, typer.Option(help="The tenant whose orders the caller may use.")] = "default",
    subject: Annotated[str, typer.Option(help="The name of the caller (`sub`).")] = "developer",
    scope: Annotated[
        list[str] | None, typer.Option(help="A scope; repeat it for more. Default: orders:read orders:write.")
    ] = None,
    expires_in: Annotated[str, typer.Option(help="Seconds, or a number followed by s, m, h or d.")] = "1h",
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
    given = {name: value for name, value in claims.items() if value}
    typer.echo(tokens.sign(secret, given, parse_duration(expires_in, "--expires-in")))
