"""Write the generated documents and Grafana's dashboards; with `--check`, exit 1 if one is stale."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
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
from app.operations import ages, audit
from app.operations.ages import AgeLimit
from app.orders import tables
from app.saga import pauses, store
from app.settings import ALL_ROLES, PREFIX, Settings, load
from app.telemetry_settings import PREFIX as OTEL_PREFIX
from app.telemetry_settings import Telemetry
from scripts.dashboards import pages as dashboards
from tests.harness.failure_modes import MODES, FailureMode

TABLES_IN = (audit, inbox, outbox, pauses, store, tables, transport_lease)  # importing them fills db.metadata
DIALECT: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
RULES = REPOSITORY / "deploy" / "prometheus" / "rules.yml"
DASHBOARDS = REPOSITORY / "deploy" / "grafana" / "dashboards"

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

## Traces

`orders serve` and `orders demo` obey these standard variables of OpenTelemetry ([what is traced](tracing.md)). The
exporter reads those for certificates and compression too.

| variable | default | meaning |
|---|---|---|
{otel_rows}

## Demo

`orders demo` also reads `ORDERS_PG_BIN`: a directory with PostgreSQL's `postgres` and `initdb`. The default is the
newest installed one. Its service waits a third of the usual time for leases and partners ([demo.md](demo.md)).
"""

SCHEMA = """\
-- The tables as the migrations leave them, for reading: `orders migrate` makes them. `make generate` makes this page
-- from the tables that the code describes; tests/integration/test_schema.py compares these with the migrations.
"""

AGES = """\
# Age limits

Each row in each state has an owner, and most have a limit: how long a row may be in the state until it is reported (I6
in [invariants.md](invariants.md)). `orders verify` lists the orders of the rows past their limits, and the alert of
each limit fires. `{gauge}` counts the rows of the states that have no metric of their own, up to
{counted:,} of each state. All ages are by Postgres's clock. `make generate` makes this table from
`app/operations/ages.py`.

| table | state | moved on by | limit | metric | alert | meaning |
|---|---|---|---|---|---|---|
{rows}
"""

FAILURE_MODES = """\
# Failure modes

What each failure looks like: to support (`why_stuck` in the [timeline](timeline.md) of an order that suffers from it),
in the metrics, and which [alert](alerts.md) fires if it lasts. `tests/e2e/test_failure_modes.py` provokes each of them
with real servers and processes. `make generate` makes this table from `tests/harness/failure_modes.py`.

| failure | `waiting_for` | `why_stuck` says, or how the order ends | metric | alert |
|---|---|---|---|---|
{rows}
"""

ALERTS = """\
# Alerts

The alert rules of the service are in [`deploy/prometheus/rules.yml`](../deploy/prometheus/rules.yml), for Prometheus
2.42 or newer. For your own Prometheus, add the file to `rule_files`, and scrape `/metrics` of every process as job
`orders`, at least every 10 s. `promtool test rules deploy/prometheus/rules_test.yml` tests the rules. `make generate`
makes this table from them.

- `page`: customers are affected, or money may be wrong, and it does not end by itself. `ticket`: look at it on a
  working day.
- A ratio needs at least 20 events. Its failures are only those that were ours to prevent: `timed-out`, `hold-expired`
  and `compensated-by-operator`. A declined card or missing stock is none.
- Gauges about rows and queues are read from Postgres or the broker, so every process shows the same value: the rules
  take the maximum. Counters are per process: the rules take the sum.
- `time() - loop_last_success_timestamp_seconds` is the age of the last success of a background loop. It finds a relay
  or consumer that runs and does nothing, which `up` cannot.
- With service discovery, a process that is gone is no target, so `TargetDown` does not fire for it. `RelayDown` and
  `ConsumerDown` fire when the last process of their role is gone.

| alert | severity | fires when | condition |
|---|---|---|---|
{rows}
"""


def failure_modes() -> str:
    """Return the page with one row per failure mode."""
    return FAILURE_MODES.format(rows="\n".join(map(_failure_mode_row, MODES)))


def _failure_mode_row(mode: FailureMode) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in mode.labels.items())
    metric = f"`{mode.metric}{{{labels}}}`" if labels else f"`{mode.metric}`"
    alert = f"[{mode.alert}](runbook.md#{mode.alert.lower()})" if mode.alert else f"none: {mode.because}"
    if mode.answer is not None:
        shown = f"the timeline cannot be read: 503 `{mode.answer}`"
    else:
        shown = f"“{mode.says}”" if mode.says else f"`status_reason` is `{mode.status_reason}`"
    return f"| {mode.name} | {f'`{mode.waiting_for}`' if mode.waiting_for else '–'} | {shown} | {metric} | {alert} |"


def configuration() -> str:
    """Return the page with one row per setting, in the order of the class."""
    rows = (_row(name, field) for name, field in Settings.model_fields.items())
    otel_rows = (
        f"| `{OTEL_PREFIX}{name.upper()}` | {_default(field)} | {field.description} |"
        for name, field in Telemetry.model_fields.items()
    )
    return CONFIGURATION.format(rows="\n".join(rows), otel_rows="\n".join(otel_rows))


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


def age_limits() -> str:
    """Return the page with one row for each state of each table."""
    rows = "\n".join(_age_row(limit) for limit in ages.LIMITS)
    return AGES.format(gauge=ages.GAUGE, counted=ages.COUNTED_ROWS, rows=rows)


def _age_row(limit: AgeLimit) -> str:
    seconds = limit.limit_seconds
    allowed = "none" if seconds is None else f"{seconds:g} s" if seconds else "at once"
    metric = f"`{limit.metric}`" if limit.metric else ""
    alert = f"[{limit.alert}](runbook.md#{limit.alert.lower()})" if limit.alert else ""
    return f"| `{limit.table}` | {limit.state} | {limit.owner} | {allowed} | {metric} | {alert} | {limit.note} |"


def alerts() -> str:
    """Return the page with one row for each alert rule."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return ALERTS.format(rows="\n".join(_alert_row(rule) for rule in rules if "alert" in rule))


def _alert_row(rule: dict[str, Any]) -> str:
    name, severity = rule["alert"], rule["labels"]["severity"]
    summary = rule["annotations"]["summary"].removesuffix(".")
    condition = " ".join(rule["expr"].split()).replace("|", "\\|")
    lasting = f", for {rule['for']}" if "for" in rule else ""
    return f"| [{name}](runbook.md#{name.lower()}) | {severity} | {summary} | `{condition}`{lasting} |"


def main() -> int:
    """Write the files, or with `--check` compare them."""
    stale = 0
    messages = json.dumps(asyncapi.document(queues()), indent=2, ensure_ascii=False) + "\n"
    pages = {
        DOCS / "configuration.md": configuration(),
        DOCS / "openapi.json": openapi(),
        DOCS / "asyncapi.json": messages,
        DOCS / "schema.sql": schema(),
        DOCS / "ages.md": age_limits(),
        DOCS / "alerts.md": alerts(),
        DOCS / "failure-modes.md": failure_modes(),
    }
    pages |= {DASHBOARDS / name: text for name, text in dashboards.files().items()}
    for path, text in pages.items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.stderr.write(f"{path} is out of date: run `make generate`\n")
            stale += 1
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
