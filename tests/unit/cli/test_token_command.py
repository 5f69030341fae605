"""`orders token` prints one valid token, or one line that says why it cannot."""

import time
from typing import Any

import jwt
import pytest
from typer.testing import CliRunner

from app.cli.main import app
from app.errors import ConfigurationError

SECRET = "a shared secret of more than 32 bytes"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for name in ("JWKS_URL", "ISSUER", "AUDIENCE", "TENANT_CLAIM", "MODE"):
        monkeypatch.delenv(f"ORDERS_AUTH_{name}", raising=False)
    return CliRunner(env={"ORDERS_AUTH_JWT_SECRET": SECRET})


def claims(runner: CliRunner, *options: str, **env: str) -> dict[str, Any]:
    result = runner.invoke(app, ["token", *options], env=env)
    assert (result.exit_code, len(result.stdout.split())) == (0, 1)
    found: dict[str, Any] = jwt.decode(result.stdout.strip(), SECRET, ["HS256"], options={"verify_aud": False})
    return found


def test_the_default_token_reads_and_writes_for_an_hour(runner: CliRunner) -> None:
    """Its tenant is `default`, its subject `developer`."""
    found = claims(runner)
    assert (found["tenant"], found["sub"], found["scope"]) == ("default", "developer", "orders:read orders:write")
    assert found["exp"] - found["iat"] == 3600
    assert abs(found["iat"] - time.time()) < 60


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("12h", 43_200), ("7d", 604_800)])
def test_a_duration_may_have_a_unit(runner: CliRunner, text: str, seconds: int) -> None:
    """Seconds, minutes, hours or days."""
    found = claims(runner, "--expires-in", text)
    assert found["exp"] - found["iat"] == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "1.5h", "1y"])
def test_an_invalid_duration_is_a_usage_error(runner: CliRunner, text: str) -> None:
    """The exit code is 2."""
    assert runner.invoke(app, ["token", "--expires-in", text]).exit_code == 2


def test_scopes_may_be_given_together_or_one_by_one(runner: CliRunner) -> None:
    """Both forms give the same token."""
    both = "orders:read orders:operate"
    assert claims(runner, "--scope", both)["scope"] == both
    assert claims(runner, "--scope", "orders:read", "--scope", "orders:operate")["scope"] == both


def test_the_token_matches_the_configuration(runner: CliRunner) -> None:
    """Issuer, audience and tenant claim are those of the service."""
    env = {"ORDERS_AUTH_ISSUER": "me", "ORDERS_AUTH_AUDIENCE": "orders", "ORDERS_AUTH_TENANT_CLAIM": "org"}
    found = claims(runner, "--tenant", "acme", "--subject", "ada", **env)
    assert (found["iss"], found["aud"], found["org"], found["sub"]) == ("me", "orders", "acme", "ada")


def test_without_a_secret_there_is_no_token(runner: CliRunner) -> None:
    """The error names the missing setting."""
    result = runner.invoke(app, ["token"], env={"ORDERS_AUTH_JWT_SECRET": ""})
    assert isinstance(result.exception, ConfigurationError)
    assert str(result.exception).startswith("ORDERS_AUTH_JWT_SECRET is not set")
