"""Every setting has its promised default, and a bad one is one line that names its variable."""

import os
from typing import Any

import pytest
from pydantic import SecretStr

from app.errors import ConfigurationError
from app.healthcheck import address
from app.settings import ALL_ROLES, Database, Settings, load

ENOUGH = {
    "DATABASE_URL": "postgresql://orders:hunter2@127.0.0.1:5432/orders",
    "INVENTORY_URL": "http://127.0.0.1:9000",
    "PAYMENT_URL": "http://127.0.0.1:9000",
    "SHIPPING_URL": "http://127.0.0.1:9000",
}
BROKER = {"RABBITMQ_URL": "amqp://orders:orders@127.0.0.1/"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take the settings of whoever runs the tests away; what a test sets is gone after it."""
    for name in [name for name in os.environ if name.startswith("ORDERS_")]:
        monkeypatch.delenv(name)
    return monkeypatch


class Environment:
    """What the process finds in its environment."""

    def __init__(self, environment: pytest.MonkeyPatch) -> None:
        self._environment = environment

    def read(self, **variables: str) -> Settings:
        for name, value in {**ENOUGH, **variables}.items():
            self._environment.setenv(f"ORDERS_{name}", value)
        return load(Settings)

    def complaint(self, **variables: str) -> str:
        """Return the error's text, which must be one line and keep the password to itself."""
        with pytest.raises(ConfigurationError) as caught:
            self.read(**variables)
        text = str(caught.value)
        assert "\n" not in text
        assert "hunter2" not in text
        return text


@pytest.fixture
def env(environment: pytest.MonkeyPatch) -> Environment:
    return Environment(environment)


DEFAULTS = {
    "rabbitmq_url": "",
    "payment_provider": "http",
    "roles": ALL_ROLES,
    "admin_token": "",
    "port": 8000,
    "log_format": "json",
    "log_level": "INFO",
    "trace_caller_sampling": False,
    "shutdown_timeout_seconds": 20,
    "http_body_timeout_seconds": 10,
    "idempotency_required": False,
    "idempotency_ttl_seconds": 86400,
    "idempotency_wait_seconds": 5,
    "outbox_poll_seconds": 0.5,
    "outbox_batch_size": 200,
    "outbox_backoff_base_seconds": 2,
    "outbox_backoff_cap_seconds": 300,
    "outbox_publish_timeout_seconds": 5,
    "outbox_max_attempts": 10,
    "inbox_max_attempts": 7,
    "outbox_retention_seconds": 7 * 86400,
    "inbox_retention_seconds": 7 * 86400,
    "saga_retention_seconds": 90 * 86400,
    "redis_url": "",
    "rate_limit": "",
    "auth_mode": "none",
    "auth_tenant_claim": "tenant",
    "http_header_timeout_seconds": 10,
    "saga_deadline_seconds": 900,
    "saga_lease_seconds": 30,
    "partner_timeout_seconds": 10,
    "partner_retry_base_seconds": 0.25,
    "partner_retry_cap_seconds": 30,
    "partner_circuit_failures": 5,
    "partner_circuit_open_seconds": 10,
    "saga_needs_operator_seconds": 300,
    "inventory_hold_seconds": None,
}


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_a_default_is_what_was_promised(env: Environment, name: str, default: object) -> None:
    value: Any = getattr(env.read(), name)
    assert (value.get_secret_value() if isinstance(value, SecretStr) else value) == default


def test_every_empty_variable_means_the_default(env: Environment) -> None:
    """Compose files and charts set what they do not know to the empty string."""
    empty = {name.upper(): "" for name in Settings.model_fields if name.upper() not in ENOUGH}
    assert env.read(**empty) == load(Settings)


@pytest.mark.parametrize("value", ["tcp://10.0.0.1:8000", "udp://10.0.0.1:53"])
def test_the_port_that_kubernetes_sets_for_a_service_is_ignored(env: Environment, value: str) -> None:
    assert env.read(PORT=value).port == 8000


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("", "", "http://127.0.0.1:8000/livez"),
        ("0.0.0.0", "80", "http://127.0.0.1:80/livez"),  # noqa: S104 - what is read
        ("::", "tcp://10.0.0.1:8000", "http://127.0.0.1:8000/livez"),
        ("::1", "81", "http://[::1]:81/livez"),
        ("10.0.0.7", "82", "http://10.0.0.7:82/livez"),
    ],
)
def test_the_health_check_asks_where_the_service_listens(host: str, port: str, url: str) -> None:
    assert address(host, port) == url


def test_every_setting_says_what_it_means() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_value_given_in_code_comes_before_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ORDERS_DATABASE_URL", "postgresql://of-the-environment/")
    given = load(Database, database_url="postgresql://given/")
    assert given.database_url.get_secret_value() == "postgresql://given/"


@pytest.mark.usefixtures("environment")
def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^ORDERS_DATABASE_URL: is not set$"):
        load(Database)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@127.0.0.1:5432/orders",
        "postgres://u:p@db/orders?sslmode=require",
        "postgresql+asyncpg://u@[::1]:6432/orders",
        "postgresql://u:p@one:5432,two:5433/orders",
        "postgresql:///orders?host=/var/run/postgresql",
    ],
)
def test_every_usual_spelling_of_the_database_is_accepted(env: Environment, url: str) -> None:
    assert env.read(DATABASE_URL=url).database_url.get_secret_value() == url


@pytest.mark.parametrize("url", ["", "amqp://u:p@host:5672/vhost", "amqps://u:p@host/"])
def test_every_usual_spelling_of_the_broker_is_accepted(env: Environment, url: str) -> None:
    assert env.read(RABBITMQ_URL=url).rabbitmq_url.get_secret_value() == url


@pytest.mark.parametrize("url", ["http://host:9000", "https://host/below/a/path", "http://[::1]:9000"])
def test_every_usual_spelling_of_a_partner_is_accepted(env: Environment, url: str) -> None:
    assert env.read(PAYMENT_URL=url).payment_url == url


def test_passwords_do_not_show_when_settings_are_printed(env: Environment) -> None:
    assert "hunter2" not in repr(env.read(RABBITMQ_URL="amqp://orders:hunter2@127.0.0.1/"))


BAD = [
    ("REDIS_URL", "http://127.0.0.1"),
    ("REDIS_URL", "redis://:hunter2@127.0.0.1:port/"),
    ("REDIS_URL", "redis://127.0.0.1/first"),
    ("REDIS_URL", "redis://127.0.0.1/0?db=first"),
    ("REDIS_URL", "redis://127.0.0.1/0?ssl_cert_reqs=none"),
    ("REDIS_URL", "rediss://127.0.0.1/0?ssl_cert_reqs=maybe"),
    ("RATE_LIMIT", "0/second"),
    ("RATE_LIMIT", "200"),
    ("RATE_LIMIT", "200/fortnight"),
    ("RATE_LIMIT", "1/second; 2/hour"),
    ("ADMIN_TOKEN", "hunter2 and more"),
    ("PAYMENT_PROVIDER", "cash"),
    ("STRIPE_API_KEY", "pk_test_hunter2"),
    ("STRIPE_API_KEY", "sk_test_hunter2\n"),
    ("AUTH_MODE", "basic"),
    ("AUTH_JWKS_URL", "ftp://issuer/keys"),
    ("AUTH_JWKS_URL", "https://"),
    ("AUTH_JWT_SECRET", "hunter2"),
    ("HTTP_MAX_CONNECTIONS", "0"),
    ("DATABASE_URL", ""),
    ("DATABASE_URL", "mysql://orders:hunter2@127.0.0.1/orders"),
    ("DATABASE_URL", "orders:hunter2@127.0.0.1/orders"),
    ("DATABASE_URL", "postgresql://orders:hunter2@127.0.0.1:port/orders"),
    ("DATABASE_URL", "postgresql://orders:hunter2@one:5432,two:65536/orders"),
    ("DATABASE_URL", "postgresql://orders:hunter2@/orders?host=one,two"),
    ("DATABASE_URL", "postgresql://orders:hunter2@[::1/orders"),
    ("RABBITMQ_URL", "http://127.0.0.1"),
    ("RABBITMQ_URL", "amqp://orders:hunter2@127.0.0.1:port/"),
    ("INVENTORY_URL", "ftp://127.0.0.1"),
    ("INVENTORY_URL", "http://"),
    ("PAYMENT_URL", "127.0.0.1:9000"),
    ("PAYMENT_URL", "http://127.0.0.1:port"),
    ("SHIPPING_URL", "/v1"),
    ("SHIPPING_URL", "http://127.0.0.1:65536"),
    ("PAYMENT_URL", "http://127.0.0.1:9000?key=hunter2"),
    ("PAYMENT_URL", "http://127.0.0.1:9000/#"),
    ("PORT", "tcp"),
    ("IDEMPOTENCY_WAIT_SECONDS", "2147484"),
    ("PORT", "-1"),
    ("PORT", "65536"),
    ("PORT", "eighty"),
    ("LOG_FORMAT", "xml"),
    ("LOG_LEVEL", "LOUD"),
    ("DATABASE_POOL_SIZE", "0"),
    ("DATABASE_POOL_SIZE", "1001"),
    ("OUTBOX_BATCH_SIZE", "0"),
    ("OUTBOX_BATCH_SIZE", "1.5"),
    ("OUTBOX_MAX_ATTEMPTS", "0"),
    ("INBOX_MAX_ATTEMPTS", "-7"),
    ("CONSUMER_PREFETCH", "65536"),
    ("PARTNER_CIRCUIT_FAILURES", "0"),
    ("IDEMPOTENCY_REQUIRED", "maybe"),
    *[
        (name.upper(), value)
        for name in Settings.model_fields
        if name.endswith("_seconds")
        for value in ("0", "-1", "soon", "nan", "inf", "31536001")
    ],
    ("ROLES", " , "),
    ("ROLES", "api,cook"),
    ("ROLES", "API"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_that_is_malformed_or_out_of_range_is_one_line_that_names_the_variable(
    env: Environment, name: str, value: str
) -> None:
    assert env.complaint(**{name: value}).startswith(f"ORDERS_{name}")


def test_an_unknown_role_is_told_with_those_that_exist(env: Environment) -> None:
    assert env.complaint(ROLES="api,cook") == (
        "ORDERS_ROLES: unknown role cook; roles are api, consumer, janitor, relay"
    )


@pytest.mark.parametrize(
    ("spelled", "roles"),
    [("api", {"api"}), ("api, janitor,", {"api", "janitor"}), ("relay,consumer,relay", {"relay", "consumer"})],
)
def test_roles_are_a_list_with_commas(env: Environment, spelled: str, roles: set[str]) -> None:
    assert env.read(ROLES=spelled).roles == roles


@pytest.mark.parametrize("roles", ["relay", "consumer", "api,relay", "consumer,janitor"])
def test_relay_and_consumer_may_part_only_where_there_is_a_broker(env: Environment, roles: str) -> None:
    assert env.complaint(ROLES=roles).startswith("ORDERS_RABBITMQ_URL")
    assert env.read(ROLES=roles, **BROKER).roles == set(roles.split(","))


@pytest.mark.parametrize("name", ["INVENTORY_URL", "PAYMENT_URL", "SHIPPING_URL"])
def test_the_consumer_needs_every_partner_and_nobody_else_needs_one(env: Environment, name: str) -> None:
    assert env.complaint(ROLES="consumer", **BROKER, **{name: ""}).startswith(f"ORDERS_{name}")
    assert env.read(ROLES="api,relay,janitor", **BROKER, **{name: ""}).roles == {"api", "relay", "janitor"}


def test_stripe_needs_a_key_and_no_address_and_only_where_sagas_run(env: Environment) -> None:
    stripe = {"PAYMENT_PROVIDER": "stripe", "PAYMENT_URL": ""}
    assert env.complaint(**stripe) == "ORDERS_STRIPE_API_KEY is needed with ORDERS_PAYMENT_PROVIDER=stripe"
    assert env.complaint(**stripe, INVENTORY_URL="").startswith("ORDERS_INVENTORY_URL")
    assert env.read(**stripe, ROLES="api", INVENTORY_URL="").payment_provider == "stripe"
    settings = env.read(**stripe, ROLES="consumer,relay", STRIPE_API_KEY="rk_live_hunter2")
    assert "hunter2" not in repr(settings)


def test_a_partner_call_fits_three_times_into_the_lease_of_its_saga(env: Environment) -> None:
    assert env.complaint(SAGA_LEASE_SECONDS="29.9").startswith("ORDERS_PARTNER_TIMEOUT_SECONDS")
    assert env.read(SAGA_LEASE_SECONDS="30").partner_timeout_seconds == 10


def test_a_batch_is_given_up_before_its_lease_ends(env: Environment) -> None:
    assert env.complaint(OUTBOX_LEASE_SECONDS="5").startswith("ORDERS_OUTBOX_PUBLISH_TIMEOUT_SECONDS")
    assert env.read(OUTBOX_LEASE_SECONDS="5.1").outbox_lease_seconds == 5.1


def test_a_hold_outlives_its_saga(env: Environment) -> None:
    assert env.read(SAGA_DEADLINE_SECONDS="60", INVENTORY_HOLD_SECONDS="61").inventory_hold_seconds == 61
    assert env.complaint(INVENTORY_HOLD_SECONDS="60").startswith("ORDERS_INVENTORY_HOLD_SECONDS")


def test_tokens_are_checked_with_one_kind_of_key(env: Environment) -> None:
    secret, url = "hunter2" * 5, "https://issuer/keys"
    assert env.complaint(AUTH_MODE="jwt") == (
        "ORDERS_AUTH_JWT_SECRET or ORDERS_AUTH_JWKS_URL is needed with ORDERS_AUTH_MODE=jwt"
    )
    assert env.read(AUTH_MODE="jwt", AUTH_JWT_SECRET=secret).auth_mode == "jwt"
    assert env.complaint(AUTH_MODE="jwt", AUTH_JWKS_URL=url).startswith("ORDERS_AUTH_JWT_SECRET must not be set")
    assert env.read(AUTH_MODE="jwt", AUTH_JWT_SECRET="", AUTH_JWKS_URL=url).auth_jwks_url == url
