"""Bugs of messages: I3 and I4."""

from chaos.bugs.planting import Bug

BUGS = (
    Bug(
        name="messages are published without mandatory",
        invariant="I3",
        path="app/messaging/rabbitmq/batch.py",
        good="mandatory=envelope.type in self._mandatory_types,",
        bad="mandatory=False,",
        caught_by=["tests/integration/messaging/test_rabbitmq.py"],
    ),
    Bug(
        name="an order is committed before its event",
        invariant="I3",
        path="app/orders/store.py",
        good="    found = [events.event_for(row.order, row.trace) for row in rows]\n",
        bad=(
            '    await conn.execute("COMMIT")\n'
            '    await conn.execute("BEGIN")\n'
            "    found = [events.event_for(row.order, row.trace) for row in rows]\n"
        ),
        caught_by=["tests/integration/orders/test_store.py::test_an_order_whose_event_is_refused_does_not_exist"],
    ),
    Bug(
        name="a returned message counts as confirmed",
        invariant="I3",
        path="app/messaging/rabbitmq/publisher.py",
        good="channel(publisher_confirms=True, on_return_raises=True)",
        bad="channel(publisher_confirms=True, on_return_raises=False)",
        caught_by=["tests/integration/messaging/test_rabbitmq.py"],
    ),
    Bug(
        name="messages are not persistent",
        invariant="I3",
        path="app/messaging/rabbitmq/properties.py",
        good='PERSISTENT = b"\\x02"',
        bad='PERSISTENT = b"\\x01"',
        caught_by=["tests/integration/messaging/test_rabbitmq.py"],
    ),
    Bug(
        name="rows are recorded as published before the confirm",
        invariant="I3",
        path="app/messaging/relay.py",
        good="results: list[PublishResult] = [UNCONFIRMED] * len(rows)",
        bad="results: list[PublishResult] = [None] * len(rows)",
        caught_by=["tests/integration/messaging/test_relay.py"],
    ),
    Bug(
        name="a relay without its lease still records",
        invariant="I3",
        path="app/messaging/outbox.py",
        good="WHERE outbox.id = result.id AND claim_token = $1",
        bad="WHERE outbox.id = result.id AND $1::uuid IS NOT NULL",
        caught_by=["tests/integration/messaging/test_outbox.py"],
    ),
    Bug(
        name="the sequence of an order's events is not checked",
        invariant="I3",
        path="app/messaging/outbox.py",
        good="AND sequence <= (\n",
        bad="AND sequence * 0 <= (\n",
        caught_by=["tests/integration/messaging/test_outbox.py"],
    ),
    Bug(
        name="the inbox is off: every delivery takes effect",
        invariant="I4",
        path="app/messaging/inbox.py",
        good="        WHERE inbox.processed_at IS NULL\n        RETURNING message_id",
        bad="        RETURNING message_id",
        caught_by=["tests/integration/messaging/test_consumer.py"],
    ),
    Bug(
        name="a resent message has another identity, and takes effect twice",
        invariant="I4",
        path="app/messaging/consumer.py",
        good="        new = await inbox.first_time(conn, self._name, [str(envelope.id) for envelope in envelopes])\n",
        bad=(
            '        names = [f"{envelope.id}:{id(envelope)}" for envelope in envelopes]\n'
            '        new = {name.partition(":")[0] for name in await inbox.first_time(conn, self._name, names)}\n'
        ),
        caught_by=["tests/integration/messaging/test_consumer.py"],
    ),
    Bug(
        name="the inbox forgets before a message can no longer be resent",
        invariant="I4",
        path="app/messaging/inbox.py",
        good="AND processed_at <= clock_timestamp() - make_interval(secs => $4)",
        bad="AND processed_at <= clock_timestamp() - make_interval(secs => $4 * 0)",
        caught_by=["tests/integration/operations/test_pruner.py::test_an_old_message_that_took_effect_lately_stays"],
    ),
    Bug(
        name="a message is acknowledged before it is handled",
        invariant="I4",
        path="app/messaging/rabbitmq/subscription.py",
        good=(
            "        match await handle_to_end(self._consumer, message.headers, message.body, ended):\n"
            "            case Handled():\n"
            "                await message.ack()\n"
        ),
        bad=(
            "        await message.ack()\n"
            "        match await handle_to_end(self._consumer, message.headers, message.body, ended):\n"
            "            case Handled():\n"
            "                pass\n"
        ),
        caught_by=["tests/integration/messaging/test_subscription.py"],
    ),
    Bug(
        name="a saga is written without its fencing token",
        invariant="I4",
        path="app/saga/store.py",
        good="WHERE sagas.id = given.id AND sagas.version = given.version\n",
        bad="WHERE sagas.id = given.id\n",
        caught_by=["tests/integration/saga/test_store.py"],
    ),
)
