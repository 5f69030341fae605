"""Run the migrations over asyncpg, each in its own transaction, in one process at a time.

One transaction for all of them would keep the locks of each until the end, and could deadlock with requests. It needs a
direct connection to the server: a transaction pooler would pass the connection, and its lock, to another client.
"""

import asyncio
from functools import partial

import asyncpg
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app import db, settings
from app.db_session import connect
from app.errors import ConfigurationError
from app.messaging import inbox, outbox, transport_lease
from app.operations import audit
from app.orders import tables
from app.saga import pauses, store

TABLES = (outbox, inbox, transport_lease, tables, store, pauses, audit)  # importing them fills db.metadata
LOCK = 6_018_743  # arbitrary, but the same in every release: only one process migrates at a time


def migrate(connection: Connection) -> None:
    require_rights(connection)
    lock(connection)
    # While a migration waits for a table's lock, every request queues behind it. So stop waiting, and retry later.
    connection.execute(text("SET lock_timeout = '2s'"))
    connection.commit()
    context.configure(
        connection=connection, target_metadata=db.metadata, compare_type=True, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()


def lock(connection: Connection) -> None:
    """Wait until no other process migrates; the lock lasts until the connection closes.

    A session that waits has a snapshot, and CREATE INDEX CONCURRENTLY of the other process would wait for its end: a
    deadlock. So it waits in short tries.
    """
    connection.execute(text("SET lock_timeout = '200ms'"))
    connection.commit()
    while True:
        try:
            connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        except DBAPIError as error:
            connection.rollback()
            if not isinstance(error.orig and error.orig.__cause__, asyncpg.LockNotAvailableError):
                raise
        else:
            return


def require_rights(connection: Connection) -> None:
    """Refuse a role that may not create tables, even if there are none to create: fail now, not at the next upgrade."""
    query = "SELECT current_user, current_schema(), has_schema_privilege(current_schema(), 'CREATE')"
    user, schema, may_create = connection.execute(text(query)).one()
    if not may_create:  # None: there is no schema that the role may use
        named = "any schema of its search_path" if schema is None else f"the schema {schema}"
        raise ConfigurationError(
            f"ORDERS_DATABASE_URL: the role {user} may not create tables in {named}: {db.MIGRATING_ROLE}"
        )


async def main() -> None:
    url = context.config.attributes.get("url") or settings.load(settings.Database).database_url.get_secret_value()
    # A session like those of the service, because SQLAlchemy does not know options such as `sslmode`.
    engine = create_async_engine("postgresql+asyncpg://", async_creator=partial(connect, url), poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
    finally:
        await engine.dispose()


asyncio.run(main())
