"""Every setting: name, default, unit and meaning. Read in `main`, `cli` and `demo` only; all else takes values."""

from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import ConfigurationError

PREFIX = "ORDERS_"
Role = Literal["api", "relay", "consumer", "janitor"]
ALL_ROLES: frozenset[Role] = frozenset({"api", "relay", "consumer", "janitor"})
Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]


class Database(BaseSettings):
    """What `orders migrate` needs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    database_url: SecretStr = Field(description="PostgreSQL: `postgresql://`, `postgres://` or `postgresql+asyncpg://`")

    @field_validator("database_url")
    @classmethod
    def _database_spelling(cls, value: SecretStr) -> SecretStr:
        _check_url(value.get_secret_value(), "postgresql", "postgres", "postgresql+asyncpg")
        return value


class Settings(Database):
    """What `orders serve` needs. Environment variables with the prefix `ORDERS_`; times are in seconds."""

    database_pool_size: PositiveInt = Field(
        default=10, le=1000, description="connections for requests, and as many again for the other roles"
    )
    redis_url: SecretStr = Field(
        default=SecretStr(""), description="`redis(s)://`, for copies of finished answers; empty: run without Redis"
    )
    rabbitmq_url: SecretStr = Field(default=SecretStr(""), description="`amqp(s)://`; empty: in-process transport")
    inventory_url: str = Field(default="", description="the inventory partner; needed by the role consumer")
    payment_url: str = Field(default="", description="the payment partner; needed by the role consumer")
    shipping_url: str = Field(default="", description="the shipping partner; needed by the role consumer")

    roles: Annotated[frozenset[Role], NoDecode] = Field(
        default=ALL_ROLES,
        description="what this process does, separated by commas; `consumer` also runs the sagas",
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    admin_token: SecretStr = Field(
        default=SecretStr(""), description="operators' bearer token for `/ops`; empty: there is no `/ops`"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on, whatever the roles")
    log_format: Literal["json", "console"] = Field(default="json", description="one JSON object a line, or for people")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="least level logged")
    shutdown_timeout_seconds: Seconds = Field(default=20, description="SIGTERM to exit at the latest")

    http_body_timeout_seconds: Seconds = Field(default=10, description="a request's body must arrive within")
    http_max_in_flight: PositiveInt = Field(
        default=1000, le=100_000, description="requests served at a time by a process; beyond, 503"
    )
    idempotency_required: bool = Field(default=False, description="refuse a write without an Idempotency-Key")
    idempotency_ttl_seconds: Seconds = Field(default=86_400, description="lifetime of a key from its first use")
    idempotency_wait_seconds: Seconds = Field(default=5, description="wait for the first request with the same key")

    outbox_poll_seconds: Seconds = Field(default=0.5, description="between looks at the outbox (woken at once besides)")
    outbox_batch_size: PositiveInt = Field(default=200, le=10_000, description="rows claimed at a time")
    outbox_lease_seconds: Seconds = Field(default=30, description="a claimed row is another relay's after")
    outbox_publish_timeout_seconds: Seconds = Field(default=5, description="a batch's confirms must arrive within")
    outbox_backoff_base_seconds: Seconds = Field(default=2, description="first pause after a refused row, full jitter")
    outbox_backoff_cap_seconds: Seconds = Field(default=300, description="longest such pause")
    outbox_max_pending: PositiveInt = Field(
        default=1_000_000, description="events waiting for the broker; beyond, intake answers 503"
    )
    outbox_max_attempts: PositiveInt = Field(default=10, description="refusals before a row is parked")

    consumer_prefetch: PositiveInt = Field(default=64, le=65_535, description="unacknowledged messages held at a time")
    inbox_max_attempts: PositiveInt = Field(default=7, description="failures before a message is dead-lettered")

    saga_poll_seconds: Seconds = Field(default=0.5, description="between looks for due sagas (woken at once besides)")
    saga_concurrency: PositiveInt = Field(default=64, le=10_000, description="sagas driven at a time by a process")
    saga_lease_seconds: Seconds = Field(default=30, description="a saga whose runner died is another's after")
    saga_deadline_seconds: Seconds = Field(default=900, description="not done by then: the saga turns back")
    partner_timeout_seconds: Seconds = Field(default=10, description="one call to a partner, at most lease / 3")
    partner_retry_base_seconds: Seconds = Field(
        default=0.25, description="first pause before a call again, full jitter"
    )
    partner_retry_cap_seconds: Seconds = Field(default=30, description="longest such pause")
    inventory_hold_seconds: Seconds | None = Field(
        default=None, description="lifetime asked for a hold of stock; default: the saga's deadline + 300"
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

    @field_validator("rabbitmq_url")
    @classmethod
    def _broker_spelling(cls, value: SecretStr) -> SecretStr:
        if url := value.get_secret_value():
            _check_url(url, "amqp", "amqps")
        return value

    @field_validator("redis_url")
    @classmethod
    def _cache_spelling(cls, value: SecretStr) -> SecretStr:
        if url := value.get_secret_value():
            _check_url(url, "redis", "rediss")
        return value

    @field_validator("inventory_url", "payment_url", "shipping_url")
    @classmethod
    def _partner_spelling(cls, value: str) -> str:
        if value:
            _check_url(value, "http", "https")
            if not urlsplit(value).hostname:
                raise ValueError("names no host")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.partner_timeout_seconds > self.saga_lease_seconds / 3:
            _refuse("PARTNER_TIMEOUT_SECONDS", "must be at most a third of ORDERS_SAGA_LEASE_SECONDS")
        if self.outbox_publish_timeout_seconds >= self.outbox_lease_seconds:
            _refuse("OUTBOX_PUBLISH_TIMEOUT_SECONDS", "must be less than ORDERS_OUTBOX_LEASE_SECONDS")
        if self.hold_seconds <= self.saga_deadline_seconds:
            _refuse("INVENTORY_HOLD_SECONDS", "must be more than ORDERS_SAGA_DEADLINE_SECONDS")
        if not self.rabbitmq_url.get_secret_value() and len(self.roles & {"relay", "consumer"}) == 1:
            _refuse("RABBITMQ_URL", "is needed when ORDERS_ROLES has only one of relay and consumer")
        if "consumer" in self.roles:
            for name in ("inventory_url", "payment_url", "shipping_url"):
                if not getattr(self, name):
                    _refuse(name.upper(), "is needed by the role consumer")
        return self

    @property
    def hold_seconds(self) -> float:
        """Seconds a hold of stock must last, so that it outlives the saga and nothing has to be extended."""
        return self.inventory_hold_seconds or self.saga_deadline_seconds + 300


def _check_url(url: str, *schemes: str) -> None:
    """Raise ValueError, which quotes nothing of the URL: there may be a password in it."""
    if url.partition("://")[0] not in schemes:
        raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    try:
        for host in urlsplit(url).netloc.rpartition("@")[2].split(","):  # PostgreSQL's may name several
            _ = urlsplit(f"//{host}").port  # reading it is what checks it
    except ValueError:
        raise ValueError("its host and port cannot be read") from None


def _refuse(name: str, why: str) -> None:
    raise ConfigurationError(f"{PREFIX}{name} {why}")


Kind = TypeVar("Kind", bound=BaseSettings)


def load(kind: type[Kind], **values: Any) -> Kind:
    """Read the environment; `values` come before it. Raises ConfigurationError: one line that names the variable."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        what = "is not set" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{name}: {what}") from error
