-- The tables as the migrations leave them, for reading: `orders migrate` makes them. `make generate` makes this page
-- from the tables that the code describes; tests/integration/test_schema.py compares these with the migrations.

CREATE TABLE idempotency_keys (
    tenant TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BYTEA NOT NULL,
    fingerprint_version SMALLINT NOT NULL,
    status SMALLINT NOT NULL,
    location TEXT NOT NULL,
    body BYTEA NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (tenant, key)
);

CREATE INDEX idempotency_keys_expires_at_idx ON idempotency_keys (expires_at);

CREATE TABLE inbox (
    consumer TEXT NOT NULL,
    message_id TEXT NOT NULL,
    attempts INTEGER DEFAULT 0 NOT NULL,
    first_failure_at TIMESTAMP WITH TIME ZONE,
    last_failure_at TIMESTAMP WITH TIME ZONE,
    last_error TEXT,
    processed_at TIMESTAMP WITH TIME ZONE,
    dead_at TIMESTAMP WITH TIME ZONE,
    purged_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT inbox_pkey PRIMARY KEY (consumer, message_id)
);

CREATE INDEX inbox_dead_at_idx ON inbox (consumer, dead_at) WHERE dead_at IS NOT NULL AND processed_at IS NULL;

CREATE TABLE operator_actions (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    order_id UUID,
    reason TEXT NOT NULL,
    outcome TEXT NOT NULL,
    selection JSONB,
    counts JSONB,
    CONSTRAINT operator_actions_pkey PRIMARY KEY (id),
    CONSTRAINT operator_actions_order_id_fkey FOREIGN KEY(order_id) REFERENCES orders (id)
);

CREATE INDEX operator_actions_order_id_idx ON operator_actions (order_id);

CREATE TABLE order_lines (
    order_id UUID NOT NULL,
    number INTEGER NOT NULL,
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL CONSTRAINT order_lines_quantity_check CHECK (quantity > 0),
    unit_price_minor BIGINT NOT NULL CONSTRAINT order_lines_unit_price_check CHECK (unit_price_minor >= 0),
    CONSTRAINT order_lines_pkey PRIMARY KEY (order_id, number),
    CONSTRAINT order_lines_order_id_fkey FOREIGN KEY(order_id) REFERENCES orders (id)
);

CREATE TABLE orders (
    id UUID NOT NULL,
    tenant TEXT NOT NULL,
    status TEXT NOT NULL CONSTRAINT orders_status_check CHECK (status IN ('pending', 'confirmed', 'compensating', 'rejected', 'cancelled')),
    status_reason TEXT,
    customer_id TEXT,
    currency TEXT NOT NULL,
    total_minor BIGINT NOT NULL CONSTRAINT orders_total_check CHECK (total_minor > 0),
    payment_method TEXT,
    shipping_address JSONB,
    metadata JSONB,
    tracking_id TEXT,
    version INTEGER NOT NULL,
    placed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL,
    cancel_requested_at TIMESTAMP WITH TIME ZONE,
    cancel_reason TEXT,
    CONSTRAINT orders_pkey PRIMARY KEY (id)
);

CREATE INDEX orders_status_tenant_placed_at_id_idx ON orders (status, tenant, placed_at, id) WHERE status <> 'confirmed';

CREATE INDEX orders_tenant_customer_id_placed_at_id_idx ON orders (tenant, customer_id, placed_at, id) WHERE customer_id IS NOT NULL;

CREATE INDEX orders_tenant_placed_at_id_idx ON orders (tenant, placed_at, id);

CREATE INDEX orders_tracking_id_idx ON orders USING hash (tracking_id) WHERE tracking_id IS NOT NULL;

CREATE TABLE outbox (
    id UUID NOT NULL,
    type TEXT NOT NULL,
    subject TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    data JSONB NOT NULL,
    traceparent TEXT,
    tracestate TEXT,
    occurred_at TIMESTAMP WITH TIME ZONE NOT NULL,
    next_attempt_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    claim_token UUID,
    attempts INTEGER DEFAULT 0 NOT NULL,
    last_error TEXT,
    published_at TIMESTAMP WITH TIME ZONE,
    parked_at TIMESTAMP WITH TIME ZONE,
    resends INTEGER DEFAULT 0 NOT NULL,
    pending_since TIMESTAMP WITH TIME ZONE,
    first_published_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT outbox_pkey PRIMARY KEY (id)
);

CREATE INDEX outbox_next_attempt_at_idx ON outbox (next_attempt_at, id) WHERE published_at IS NULL AND parked_at IS NULL;

CREATE INDEX outbox_subject_sequence_idx ON outbox (subject, sequence) WHERE published_at IS NULL;

CREATE TABLE partner_pauses (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    partner TEXT NOT NULL,
    paused_at TIMESTAMP WITH TIME ZONE NOT NULL,
    ends_at TIMESTAMP WITH TIME ZONE NOT NULL,
    ended_at TIMESTAMP WITH TIME ZONE,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    CONSTRAINT partner_pauses_pkey PRIMARY KEY (id)
);

CREATE INDEX partner_pauses_ends_at_idx ON partner_pauses (ends_at);

CREATE TABLE saga_steps (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    saga_id UUID NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    step TEXT NOT NULL,
    action TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    detail TEXT,
    reply JSONB,
    started_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT saga_steps_pkey PRIMARY KEY (id),
    CONSTRAINT saga_steps_saga_id_fkey FOREIGN KEY(saga_id) REFERENCES sagas (id)
);

CREATE INDEX saga_steps_payment_id_idx ON saga_steps USING hash ((reply ->> 'payment_id')) WHERE (reply ->> 'payment_id') IS NOT NULL;

CREATE INDEX saga_steps_saga_id_idx ON saga_steps (saga_id);

CREATE TABLE sagas (
    id UUID NOT NULL,
    plan_version SMALLINT NOT NULL,
    direction TEXT NOT NULL CONSTRAINT sagas_direction_check CHECK (direction IN ('forward', 'backward')),
    step TEXT,
    attempts INTEGER NOT NULL,
    reason TEXT,
    version INTEGER NOT NULL,
    next_attempt_at TIMESTAMP WITH TIME ZONE NOT NULL,
    lease_owner TEXT,
    deadline_at TIMESTAMP WITH TIME ZONE NOT NULL,
    traceparent TEXT,
    tracestate TEXT,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    needs_operator_at TIMESTAMP WITH TIME ZONE,
    hold_seconds INTEGER,
    compensating_at TIMESTAMP WITH TIME ZONE,
    traced_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT sagas_pkey PRIMARY KEY (id),
    CONSTRAINT sagas_id_fkey FOREIGN KEY(id) REFERENCES orders (id)
);

CREATE INDEX sagas_next_attempt_at_idx ON sagas (next_attempt_at) WHERE finished_at IS NULL;

CREATE INDEX sagas_trace_id_idx ON sagas USING hash (substr(traceparent, 4, 32)) WHERE traceparent IS NOT NULL;

CREATE TABLE transport_leases (
    id UUID NOT NULL,
    transport TEXT NOT NULL,
    holder TEXT NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT transport_leases_pkey PRIMARY KEY (id)
);
