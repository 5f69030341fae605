"""The orders tables, as the migrations must create them. A test compares the two."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.db import metadata
from app.orders.model import Status

STATUSES = f"status IN ({', '.join(repr(str(status)) for status in Status)})"

orders = Table(
    "orders",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("status", Text, CheckConstraint(STATUSES, name="status"), nullable=False),
    Column("status_reason", Text),
    Column("customer_id", Text),
    Column("currency", Text, nullable=False),
    Column("total_minor", BigInteger, CheckConstraint("total_minor > 0", name="total"), nullable=False),
    Column("payment_method", Text),
    Column("shipping_address", JSONB),
    Column("metadata", JSONB),
    Column("tracking_id", Text),
    Column("version", Integer, nullable=False),
    Column("placed_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column("cancel_requested_at", DateTime(timezone=True)),
    Column("cancel_reason", Text),
    Index("orders_tenant_placed_at_id_idx", "tenant", "placed_at", "id"),
    Index(
        "orders_tenant_customer_id_placed_at_id_idx",
        "tenant",
        "customer_id",
        "placed_at",
        "id",
        postgresql_where=text("customer_id IS NOT NULL"),
    ),
    # Most orders end confirmed, and a listing finds them without this index; it finds the few others with it.
    Index(
        "orders_status_tenant_placed_at_id_idx",
        "status",
        "tenant",
        "placed_at",
        "id",
        postgresql_where=text("status <> 'confirmed'"),
    ),
    Index(
        "orders_tracking_id_idx",
        "tracking_id",
        postgresql_using="hash",
        postgresql_where=text("tracking_id IS NOT NULL"),
    ),
)

order_lines = Table(
    "order_lines",
    metadata,
    Column("order_id", ForeignKey("orders.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("sku", Text, nullable=False),
    Column("quantity", Integer, CheckConstraint("quantity > 0", name="quantity"), nullable=False),
    Column(
        "unit_price_minor",
        BigInteger,
        CheckConstraint("unit_price_minor >= 0", name="unit_price"),
        nullable=False,
    ),
)
