"""Every setting: name, default, unit and meaning. Only `main`, `bootstrap`, `cli` and `demo` read them."""

import re
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, PositiveInt, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import ConfigurationError

PREFIX = "ORDERS_"
RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)")
STRIPE_KEY = re.compile(r"[sr]k_[A-Za-z0-9_]+")
BEARER_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]*=*")
Role = Literal["api", "relay", "consumer", "janitor"]
ALL_ROLES: frozenset[Role] = frozenset({"api", "relay", "consumer", "janitor"})
REDIS_DATABASE = re.compile(r"[0-9]*")
KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://.*")  # Kubernetes sets ORDERS_PORT so for a Service named `orders`
MIN_SECRET_BYTES = 32  # RFC 7518, section 3.2: a key for HS256 is no shorter than its hash
Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]
LockSeconds = Annotated[Seconds, Field(le=2_147_483)]  # Postgres's lock_timeout is a 32-bit integer of milliseconds


class Database(BaseSettings):
    """What `orders migrate` needs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    database_url: SecretStr = Field(
        description=(
            "PostgreSQL: `postgresql://`, `postgres://` or `postgresql+asyncpg://`; "
            "of several hosts (`//a:5432,b/orders`) the first writable one is used"
        )
    )

    @field_validator("database_url")
    @classmethod
    def _database_spelling(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        _check_url(url, "postgresql", "postgres", "postgresql+asyncpg")
        if any("," in hosts for name, hosts in parse_qsl(urlsplit(url).query) if name == "host"):
            raise ValueError("names several hosts in its query; name them before the path, as //a:5432,b/orders")
        return value


class Retention(Database):
    """What `orders prune` needs."""

    outbox_retention_seconds: Seconds = Field(
        default=604_800, description="how long published events are kept; longer while their order is unfinished"
    )
    inbox_retention_seconds: Seconds = Field(
        default=604_800, description="how long the inbox remembers processed messages"
    )
    saga_retention_seconds: Seconds = Field(default=7_776_000, description="how long finished sagas are kept")


class Operations(Database):
    """What the commands for operators need."""

    rabbitmq_url: SecretStr = Field(default=SecretStr(""), description="`amqp(s)://`; empty: in-process transport")

    @field_validator("rabbitmq_url")
    @classmethod
    def _broker_spelling(cls, value: SecretStr) -> SecretStr:
        if url := value.get_secret_value():
            _check_url(url, "amqp", "amqps")
        return value


class Partners(BaseSettings):
    """Where the partners are, and how long a call to one of them may take."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    inventory_url: str = Field(default="", description="the inventory partner; needed by the role consumer")
    payment_provider: Literal["http", "stripe"] = Field(
        default="http", description="the API of the payment partner: this service's own, or Stripe's"
    )
    payment_url: str = Field(
        default="",
        description="the payment partner; needed by the role consumer; with `stripe`: its public API",
    )
    stripe_api_key: SecretStr = Field(
        default=SecretStr(""), description="with `stripe`: a secret or restricted key; needed by the role consumer"
    )
    shipping_url: str = Field(default="", description="the shipping partner; needed by the role consumer")
    saga_lease_seconds: Seconds = Field(
        default=30, description="after this time another process may take the saga of one that died"
    )
    partner_timeout_seconds: Seconds = Field(
        default=10, description="deadline of one partner call, at most a third of the lease"
    )

    @field_validator("inventory_url", "payment_url", "shipping_url")
    @classmethod
    def _partner_spelling(cls, value: str) -> str:
        if {"?", "#"} & set(value):  # a call's path is appended
            raise ValueError("must have no query and no fragment")
        return _check_web_url(value)

    @field_validator("stripe_api_key")
    @classmethod
    def _stripe_key_spelling(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value() and not STRIPE_KEY.fullmatch(value.get_secret_value()):
            raise ValueError("must be a secret or a restricted key: sk_… or rk_…")
        return value


class Verification(Partners, Retention, Operations):
    """What `orders verify` needs."""

    outbox_max_pending: PositiveInt = Field(
        default=1_000_000, description="events that may wait for the broker; beyond, new orders get a 503"
    )


class Auth(BaseSettings):
    """Who may call. What `orders token` needs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    auth_mode: Literal["none", "jwt"] = Field(
        default="none", description="`none`: every caller is the tenant `default`; `jwt`: bearer tokens with a tenant"
    )
    auth_jwks_url: str = Field(default="", description="with `jwt`: the issuer's public keys (RFC 7517)")
    auth_jwt_secret: SecretStr = Field(
        default=SecretStr(""), description="with `jwt`, instead of the URL: HS256 with this secret, 32 bytes or more"
    )
    auth_issuer: str = Field(default="", description="`iss` must be this; empty: not checked")
    auth_audience: str = Field(default="", description="`aud` must name this; empty: not checked")
    auth_tenant_claim: str = Field(default="tenant", min_length=1, description="the claim that names the tenant")

    @field_validator("auth_jwks_url")
    @classmethod
    def _jwks_spelling(cls, value: str) -> str:
        return _check_web_url(value)

    @field_validator("auth_jwt_secret")
    @classmethod
    def _secret_length(cls, value: SecretStr) -> SecretStr:
        if 0 < len(value.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"must have at least {MIN_SECRET_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        secret = bool(self.auth_jwt_secret.get_secret_value())
        if self.auth_jwks_url and secret:
            _refuse("AUTH_JWT_SECRET", "must not be set together with ORDERS_AUTH_JWKS_URL")
        if self.auth_mode == "jwt" and not (self.auth_jwks_url or secret):
            _refuse("AUTH_JWT_SECRET", "or ORDERS_AUTH_JWKS_URL is needed with ORDERS_AUTH_MODE=jwt")
        return self


class Settings(Verification, Auth):
    """What `orders serve` needs. Environment variables with the prefix `ORDERS_`; times are in seconds."""

    database_pool_size: PositiveInt = Field(
        default=10,
        le=1000,
        description="connections for requests; as many again for messages and sagas, 4 for the relay, 2 for probes",
    )
    database_pool_wait_seconds: Seconds = Field(
        default=1, description="how long a request waits for a free connection; then 503"
    )
    database_statement_seconds: Seconds = Field(
        default=2, description="deadline of a request's statement, waits for locks excepted; then 503"
    )
    redis_url: SecretStr = Field(
        default=SecretStr(""),
        description="`redis(s)://`, for copies of responses and counts for rate limits; empty: run without Redis",
    )
    redis_timeout_seconds: Seconds = Field(
        default=0.2, description="deadline of a Redis call; then Redis is skipped for some seconds"
    )
    roles: Annotated[frozenset[Role], NoDecode] = Field(
        default=ALL_ROLES,
        description="what this process does, separated by commas; `consumer` also runs the sagas",
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; `::` takes IPv4 too")
    admin_token: SecretStr = Field(
        default=SecretStr(""), description="operators' bearer token for `/ops`; empty: none is accepted"
    )
    console: bool = Field(
        default=False, description="serve the web console; needs an admin token, or tokens of an issuer, to log in with"
    )
    port: int = Field(
        default=8000,
        ge=0,
        le=65535,
        description="port to listen on, with any roles; `tcp://…`, as Kubernetes sets for a Service, is ignored",
    )
    log_format: Literal["json", "console"] = Field(
        default="json", description="`json`: one object per line; `console`: for people"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="lowest level that is logged"
    )
    trace_caller_sampling: bool = Field(
        default=False, description="obey the sampled flag of a caller's `traceparent`: callers decide what is traced"
    )
    rate_limit: str = Field(
        default="", description="requests per tenant, such as `200/second` (`minute`, `hour`, `day`); empty: no limit"
    )
    shutdown_timeout_seconds: Seconds = Field(default=20, description="longest time from SIGTERM to exit")

    http_header_timeout_seconds: Seconds = Field(default=10, description="deadline for a request's headers to arrive")
    http_keep_alive_seconds: PositiveInt = Field(
        default=75,
        le=86_400,
        description="how long an idle connection is kept; longer than a proxy in front of the service keeps it",
    )
    http_max_connections: PositiveInt = Field(
        default=900, le=1_000_000, description="open connections; at the limit the longest idle one is closed"
    )
    http_body_timeout_seconds: Seconds = Field(default=10, description="deadline for a request's body to arrive")
    http_answer_timeout_seconds: Seconds = Field(
        default=20, description="a connection is reset if the client reads nothing of a response for this time"
    )
    http_max_in_flight: PositiveInt = Field(
        default=500,
        le=100_000,
        description="concurrent requests in a process; half as many bodies of one sender may be arriving",
    )
    idempotency_required: bool = Field(default=False, description="refuse a write without an Idempotency-Key")
    idempotency_ttl_seconds: Seconds = Field(default=86_400, description="lifetime of a key, from its first use")
    idempotency_wait_seconds: LockSeconds = Field(
        default=5, description="how long a request waits for the first one with its key"
    )

    outbox_poll_seconds: Seconds = Field(
        default=0.5, description="time between polls of the outbox; commits of this process wake the relay at once"
    )
    outbox_batch_size: PositiveInt = Field(
        default=200, le=10_000, description="rows per claim; fewer after a batch that was too much for a slow link"
    )
    outbox_lease_seconds: Seconds = Field(
        default=30, description="after this time another relay may take a claimed row"
    )
    outbox_publish_timeout_seconds: Seconds = Field(
        default=5, description="a batch ends if no confirm arrives for this time"
    )
    outbox_backoff_base_seconds: Seconds = Field(
        default=2, description="longest first pause after a row was refused; full jitter, doubling"
    )
    outbox_backoff_cap_seconds: Seconds = Field(default=300, description="upper limit of such a pause")
    outbox_max_attempts: PositiveInt = Field(default=10, description="refusals after which a row is parked")

    consumer_prefetch: PositiveInt = Field(default=64, le=65_535, description="unacknowledged messages per consumer")
    inbox_max_attempts: PositiveInt = Field(default=7, description="failures after which a message is dead-lettered")

    saga_poll_seconds: Seconds = Field(
        default=0.5, description="time between polls for due sagas; a new saga in this process starts at once"
    )
    saga_concurrency: PositiveInt = Field(default=64, le=10_000, description="concurrent sagas in a process")
    saga_deadline_seconds: Seconds = Field(
        default=900, description="a saga that is not done by then starts compensating"
    )
    partner_retry_base_seconds: Seconds = Field(
        default=0.25, description="longest first pause before a retry; full jitter, doubling"
    )
    partner_retry_cap_seconds: Seconds = Field(
        default=30, description="upper limit of such a pause; a partner's Retry-After, up to 300, is added"
    )
    partner_circuit_failures: PositiveInt = Field(
        default=5, description="failures in a row after which a process pauses its calls to a partner"
    )
    partner_circuit_open_seconds: Seconds = Field(
        default=10, description="how long calls are paused; then one call tries"
    )
    saga_needs_operator_seconds: Seconds = Field(
        default=300, description="an undo that has failed for this time needs an operator; retries continue"
    )
    inventory_hold_seconds: Seconds | None = Field(
        default=None, description="lifetime of a hold of stock; default: the saga's deadline + 300"
    )

    @field_validator("roles", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        roles = {role.strip() for role in value.split(",") if role.strip()}
        if unknown := sorted(roles - ALL_ROLES):
            raise ValueError(f"unknown role {', '.join(unknown)}; roles are {', '.join(sorted(ALL_ROLES))}")
        if not roles:
            raise ValueError("no role given")
        return roles

    @field_validator("port", mode="before")
    @classmethod
    def _own_port(cls, value: object) -> object:
        return 8000 if isinstance(value, str) and KUBERNETES_PORT.fullmatch(value) else value

    @field_validator("redis_url")
    @classmethod
    def _cache_spelling(cls, value: SecretStr) -> SecretStr:
        if url := value.get_secret_value():
            _check_url(url, "redis", "rediss")
            parts = urlsplit(url)
            options = dict(parse_qsl(parts.query, keep_blank_values=True))
            if not REDIS_DATABASE.fullmatch(options.get("db", parts.path.removeprefix("/"))):
                raise ValueError("its database must be a number")
            if parts.scheme == "redis" and any(name.startswith("ssl_") for name in options):
                raise ValueError("must begin with rediss:// to have options for TLS")
            if options.get("ssl_cert_reqs", "required") not in {"none", "optional", "required"}:
                raise ValueError("ssl_cert_reqs must be none, optional or required")
        return value

    @field_validator("admin_token")
    @classmethod
    def _token_spelling(cls, value: SecretStr) -> SecretStr:
        if not BEARER_TOKEN.fullmatch(value.get_secret_value()):
            raise ValueError("must have letters, digits and -._~+/ only, as a bearer token has (RFC 6750)")
        return value

    @field_validator("rate_limit")
    @classmethod
    def _rate_spelling(cls, value: str) -> str:
        if value and not RATE.fullmatch(value):
            raise ValueError("must be like 200/second, with second, minute, hour or day")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.partner_timeout_seconds > self.saga_lease_seconds / 3:
            _refuse("PARTNER_TIMEOUT_SECONDS", "must be at most a third of ORDERS_SAGA_LEASE_SECONDS")
        if self.outbox_publish_timeout_seconds >= self.outbox_lease_seconds:
            _refuse("OUTBOX_PUBLISH_TIMEOUT_SECONDS", "must be less than ORDERS_OUTBOX_LEASE_SECONDS")
        if self.inventory_hold_seconds is not None and self.inventory_hold_seconds <= self.saga_deadline_seconds:
            _refuse("INVENTORY_HOLD_SECONDS", "must be more than ORDERS_SAGA_DEADLINE_SECONDS")
        if not self.rabbitmq_url.get_secret_value() and len(self.roles & {"relay", "consumer"}) == 1:
            _refuse("RABBITMQ_URL", "is needed when ORDERS_ROLES has only one of relay and consumer")
        if self.console and self.auth_mode == "none" and not self.admin_token.get_secret_value():
            _refuse("CONSOLE", "needs ORDERS_ADMIN_TOKEN or ORDERS_AUTH_MODE=jwt, to log in with")
        if "consumer" in self.roles:
            stripe = self.payment_provider == "stripe"
            for name in ("inventory_url", "shipping_url", *(() if stripe else ("payment_url",))):
                if not getattr(self, name):
                    _refuse(name.upper(), "is needed by the role consumer")
            if stripe and not self.stripe_api_key.get_secret_value():
                _refuse("STRIPE_API_KEY", "is needed with ORDERS_PAYMENT_PROVIDER=stripe")
        return self


def _check_web_url(url: str) -> str:
    if url:
        _check_url(url, "http", "https")
        if not urlsplit(url).hostname:
            raise ValueError("names no host")
    return url


def _check_url(url: str, *schemes: str) -> None:
    """Raise ValueError for a wrong URL, without quoting it: it may contain a password."""
    if url.partition("://")[0] not in schemes:
        raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    try:
        for host in urlsplit(url).netloc.rpartition("@")[2].split(","):  # a PostgreSQL URL may name several
            _ = urlsplit(f"//{host}").port  # reading the port checks it
    except ValueError:
        raise ValueError("its host and port cannot be read") from None


def _refuse(name: str, why: str) -> None:
    raise ConfigurationError(f"{PREFIX}{name} {why}")


Kind = TypeVar("Kind", bound=BaseSettings)


def load(kind: type[Kind], **values: Any) -> Kind:
    """Read the environment; `values` take precedence. Raises ConfigurationError: one line that names the variable."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        what = "is not set" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{name}: {what}") from error
