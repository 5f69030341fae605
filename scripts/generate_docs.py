"""Write docs/configuration.md, docs/schema.sql and the API documents; with `--check`, exit 1 if one is stale."""

import json
import sys
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from sqlalchemy import Dialect
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from app import db
from app.api import asyncapi
from app.bootstrap.consumers import queues
from app.main import create_app
from app.messaging import inbox, outbox, transport_lease
from app.operations import audit
from app.orders import tables
from app.saga import store
from app.settings import ALL_ROLES, PREFIX, Settings, load

TABLES_IN = (audit, inbox, outbox, store, tables, transport_lease)  # importing them fills db.metadata
DIALECT: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
DOCS = Path(__file__).parents[1] / "docs"

CONFIGURATION = """\
# Configuration

`orders serve` reads environment variables once, at start-up. `orders migrate` reads only `ORDERS_DATABASE_URL`,
`orders prune` that and the retentions, and `orders token` those of `ORDERS_AUTH_*`. `orders demo` sets database,
broker, Redis, partners and roles itself. A missing, malformed or impossible value is one line on stderr that names
the variable, and exit code 2. An empty variable means the default. `make generate` makes this table from
`app/settings.py`.

| variable | default | unit | meaning |
|---|---|---|---|
{rows}

The service refuses to start with settings that contradict each other:

- `ORDERS_PARTNER_TIMEOUT_SECONDS` is at most a third of `ORDERS_SAGA_LEASE_SECONDS`: a saga's lease must outlast the
  call that its process is making.
- `ORDERS_OUTBOX_PUBLISH_TIMEOUT_SECONDS` is less than `ORDERS_OUTBOX_LEASE_SECONDS`: a relay must be done with its rows
  before another one may claim them. It spends at most nine tenths of the lease on a batch.
- `ORDERS_INVENTORY_HOLD_SECONDS` is more than `ORDERS_SAGA_DEADLINE_SECONDS`: stock must stay held for as long as the
  saga may still go forward.
- Without `ORDERS_RABBITMQ_URL` messages stay inside the process, so `relay` and `consumer` must be in one process.
  Either all relays and consumers of a database have the variable, or none: a process that differs from the running ones
  ends with exit code 2 ([how to change the transport](operations.md#change-the-transport)).
- With `ORDERS_AUTH_MODE=jwt` exactly one of `ORDERS_AUTH_JWKS_URL` and `ORDERS_AUTH_JWT_SECRET` is set; `orders token`
  needs the secret.
- The role `consumer` needs all three partner URLs; with `ORDERS_PAYMENT_PROVIDER=stripe` it needs
  `ORDERS_STRIPE_API_KEY` instead of `ORDERS_PAYMENT_URL` ([how to use Stripe](partners.md#pay-through-stripe)).

`orders demo` also reads `ORDERS_PG_BIN`: a directory with PostgreSQL's `postgres` and `initdb`. The default is the
newest installed one.
"""

SCHEMA = """\
-- The tables as the migrations leave them, for reading: `orders migrate` makes them. `make generate` makes this page
-- from the tables that the code describes; tests/integration/test_schema.py compares these with the migrations.
"""


def configuration() -> str:
    """Return the page with one row per setting, in the order of the class."""
    rows = (_row(name, field) for name, field in Settings.model_fields.items())
    return CONFIGURATION.format(rows="\n".join(rows))


def _row(name: str, field: FieldInfo) -> str:
    unit = "s" if name.endswith("_seconds") else ""
    return f"| `{PREFIX}{name.upper()}` | {_default(field)} | {unit} | {field.description} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.default:
        case SecretStr() as secret:
            value = secret.get_secret_value()
        case frozenset() as roles if roles == ALL_ROLES:
            value = "api,relay,consumer,janitor"
        case bool() as flag:
            value = str(flag).lower()
        case None:
            value = ""
        case other:
            value = f"{other:g}" if isinstance(other, float) else str(other)
    return f"`{value}`" if value else ""


def openapi() -> str:
    """Return the document that a running service serves at /openapi.json."""
    settings = load(Settings, database_url="postgresql://none", roles="api")
    return json.dumps(create_app(settings).openapi(), indent=2, ensure_ascii=False) + "\n"


def schema() -> str:
    """Return the tables and indexes as SQL, in the order of their names."""
    text = SCHEMA
    for table in sorted(db.metadata.tables.values(), key=lambda table: table.name):
        text += _statement(CreateTable(table))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            text += _statement(CreateIndex(index))
    return text


def _statement(element: CreateTable | CreateIndex) -> str:
    lines = str(element.compile(dialect=DIALECT)).strip().replace("\t", "    ").split("\n")
    return "\n" + "\n".join(line.rstrip() for line in lines if line.strip()) + ";\n"


def main() -> int:
    """Write the files, or with `--check` compare them."""
    stale = 0
    messages = json.dumps(asyncapi.document(queues()), indent=2, ensure_ascii=False) + "\n"
    pages = {
        "configuration.md": configuration(),
        "openapi.json": openapi(),
        "asyncapi.json": messages,
        "schema.sql": schema(),
    }
    for name, text in pages.items():
        path = DOCS / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.stderr.write(f"{path} is out of date: run `make generate`\n")
            stale += 1
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
