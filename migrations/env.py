"""Runs the migrations over asyncpg, in one transaction, one process at a time."""

import asyncio
from functools import partial

import asyncpg
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app import db, settings
from app.messaging import inbox, outbox
from app.orders import tables
from app.saga import store

TABLES = (outbox, inbox, tables, store)  # importing them fills db.metadata
LOCK = 6_018_743  # any number, the same in every release: only one process migrates at a time


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=db.metadata, compare_type=True)
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        context.run_migrations()


async def main() -> None:
    url = context.config.attributes.get("url") or settings.load(settings.Database).database_url.get_secret_value()
    # asyncpg reads the URL, as it does for the service: SQLAlchemy does not know `sslmode` and its like.
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=partial(asyncpg.connect, db.plain_url(url)), poolclass=NullPool
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
            await connection.commit()
    finally:
        await engine.dispose()


asyncio.run(main())
