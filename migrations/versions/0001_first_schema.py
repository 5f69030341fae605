"""Orders, idempotency keys, outbox, inbox, sagas."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE orders (
        id uuid PRIMARY KEY,
        tenant text NOT NULL,
        status text NOT NULL
            CONSTRAINT orders_status_check
            CHECK (status IN ('pending', 'confirmed', 'compensating', 'rejected', 'cancelled')),
        status_reason text,
        customer_id text,
        currency text NOT NULL,
        total_minor bigint NOT NULL CONSTRAINT orders_total_check CHECK (total_minor > 0),
        payment_method text,
        shipping_address jsonb,
        metadata jsonb,
        tracking_id text,
        version integer NOT NULL,
        placed_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL
    )
    """,
    """
    CREATE TABLE order_lines (
        order_id uuid NOT NULL REFERENCES orders (id),
        number integer NOT NULL,
        sku text NOT NULL,
        quantity integer NOT NULL CONSTRAINT order_lines_quantity_check CHECK (quantity > 0),
        unit_price_minor bigint NOT NULL CONSTRAINT order_lines_unit_price_check CHECK (unit_price_minor >= 0),
        PRIMARY KEY (order_id, number)
    )
    """,
    """
    CREATE TABLE idempotency_keys (
        tenant text NOT NULL,
        key text NOT NULL,
        fingerprint bytea NOT NULL,
        fingerprint_version smallint NOT NULL,
        status smallint NOT NULL,
        location text NOT NULL,
        body bytea NOT NULL,
        created_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL,
        PRIMARY KEY (tenant, key)
    )
    """,
    "CREATE INDEX idempotency_keys_expires_at_idx ON idempotency_keys (expires_at)",
    """
    CREATE TABLE outbox (
        id uuid PRIMARY KEY,
        type text NOT NULL,
        subject text NOT NULL,
        sequence integer NOT NULL,
        tenant text NOT NULL,
        data jsonb NOT NULL,
        traceparent text,
        tracestate text,
        occurred_at timestamptz NOT NULL,
        next_attempt_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        claim_token uuid,
        attempts integer NOT NULL DEFAULT 0,
        last_error text,
        published_at timestamptz,
        parked_at timestamptz
    )
    """,
    """
    CREATE INDEX outbox_next_attempt_at_idx ON outbox (next_attempt_at, id)
        WHERE published_at IS NULL AND parked_at IS NULL
    """,
    "CREATE INDEX outbox_subject_sequence_idx ON outbox (subject, sequence) WHERE published_at IS NULL",
    """
    CREATE TABLE inbox (
        consumer text NOT NULL,
        message_id text NOT NULL,
        attempts integer NOT NULL DEFAULT 0,
        first_failure_at timestamptz,
        last_failure_at timestamptz,
        last_error text,
        processed_at timestamptz,
        dead_at timestamptz,
        PRIMARY KEY (consumer, message_id)
    )
    """,
    """
    CREATE TABLE sagas (
        id uuid PRIMARY KEY REFERENCES orders (id),
        plan_version smallint NOT NULL,
        direction text NOT NULL
            CONSTRAINT sagas_direction_check CHECK (direction IN ('forward', 'backward')),
        step text,
        attempts integer NOT NULL,
        reason text,
        version integer NOT NULL,
        next_attempt_at timestamptz NOT NULL,
        lease_owner text,
        deadline_at timestamptz NOT NULL,
        traceparent text,
        tracestate text,
        started_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        finished_at timestamptz
    )
    """,
    "CREATE INDEX sagas_next_attempt_at_idx ON sagas (next_attempt_at) WHERE finished_at IS NULL",
    """
    CREATE TABLE saga_steps (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        saga_id uuid NOT NULL REFERENCES sagas (id),
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        step text NOT NULL,
        action text NOT NULL,
        attempt integer NOT NULL,
        outcome text NOT NULL,
        detail text,
        reply jsonb
    )
    """,
    "CREATE INDEX saga_steps_saga_id_idx ON saga_steps (saga_id)",
)


def upgrade() -> None:
    for statement in TABLES:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE saga_steps, sagas, inbox, outbox, idempotency_keys, order_lines, orders")
