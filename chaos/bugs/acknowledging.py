"""Bugs of what a client was told: I1, I2 and I9."""

from chaos.bugs.planting import Bug

BUGS = (
    Bug(
        name="asynchronous commits are accepted",
        invariant="I1",
        path="app/db_session.py",
        good='if found["synchronous_commit"] == "off" or ignores_standby:',
        bad="if ignores_standby:",
        caught_by=["tests/integration/test_db.py::test_a_session_with_asynchronous_commits_is_refused"],
    ),
    Bug(
        name="an unknown COMMIT counts as committed",
        invariant="I1",
        path="app/idempotency/transaction.py",
        good=("            if in_doubt is None:\n                raise\n"),
        bad=("            if in_doubt is None:\n                raise\n            return in_doubt\n"),
        caught_by=["tests/integration/idempotency/test_intake.py"],
    ),
    Bug(
        name="a COMMIT that waits for the standby is cancelled",
        invariant="I1",
        path="app/db.py",
        good=("            conn.terminate()\n            raise\n        except asyncpg.ReadOnlySQLTransactionError:"),
        bad=(
            "            await asyncio.sleep(0.3)\n"
            "            conn.terminate()\n"
            "            raise\n"
            "        except asyncpg.ReadOnlySQLTransactionError:"
        ),
        caught_by=["tests/integration/test_synchronous_standby.py"],
    ),
    Bug(
        name="a row that no standby has is proof of a commit",
        invariant="I1",
        path="app/idempotency/transaction.py",
        good=(
            "        async with db.connection(pool) as conn:\n"
            "            await db.await_standby(conn)\n"
            "        return C"
        ),
        bad="        return C",
        caught_by=[
            "tests/integration/test_synchronous_standby.py::test_the_second_attempt_waits_for_the_standby_too",
        ],
    ),
    Bug(
        name="the key's row is committed before the order",
        invariant="I1",
        path="app/idempotency/store.py",
        good='    return {(row["tenant"], row["key"]) for row in rows}\n',
        bad=(
            '    await conn.execute("COMMIT")\n'
            '    await conn.execute("BEGIN")\n'
            '    return {(row["tenant"], row["key"]) for row in rows}\n'
        ),
        caught_by=["tests/integration/orders/test_store.py::test_a_transaction_that_fails_writes_nothing_at_all"],
        violates_with="link to postgres: lose COMMITs",
    ),
    Bug(
        name="the same key with another body is a replay",
        invariant="I2",
        path="app/idempotency/transaction.py",
        good="    if (record.fingerprint_version, record.fingerprint) != (key.fingerprint_version, key.fingerprint):",
        bad="    if False:",
        caught_by=["tests/integration/idempotency/test_intake.py"],
    ),
    Bug(
        name="Redis decides: a copy is not compared with the request",
        invariant="I2",
        path="app/idempotency/replay_cache.py",
        good="same = {field: head[field] for field in request} == request",
        bad='same = head["name"] == request["name"]',
        caught_by=["tests/integration/idempotency/test_intake.py::test_another_request_with_a_copied_key_is_refused"],
    ),
    Bug(
        name="an expired key is never free again",
        invariant="I2",
        path="app/idempotency/store.py",
        good="    WHERE k.expires_at <= clock_timestamp()\n    RETURNING tenant, key",
        bad="    WHERE false\n    RETURNING tenant, key",
        caught_by=["tests/integration/idempotency", "tests/integration/orders/test_store.py"],
    ),
    Bug(
        name="keys are pruned before they expire",
        invariant="I2",
        path="app/idempotency/store.py",
        good="WHERE expires_at <= (SELECT clock_timestamp())",
        bad="WHERE created_at <= (SELECT clock_timestamp())",
        caught_by=["tests/integration/operations/test_pruner.py::test_only_expired_keys_are_deleted"],
    ),
    Bug(
        name="a reader gets another tenant's order",
        invariant="I9",
        path="app/orders/store.py",
        good="if order is None or order.tenant != tenant:",
        bad="if order is None:",
        caught_by=["tests/integration/auth/test_owasp.py"],
    ),
    Bug(
        name="keys are shared by all tenants",
        invariant="I9",
        path="app/idempotency/key.py",
        good="return IdempotencyKey(tenant, key, fingerprint(",
        bad='return IdempotencyKey("", key, fingerprint(',
        caught_by=["tests/integration/auth/test_owasp.py"],
    ),
    Bug(
        name="a listing shows the orders of all tenants",
        invariant="I9",
        path="app/orders/queries.py",
        good='yield f"tenant = {parameter(listing.tenant)}"',
        bad='yield f"{parameter(listing.tenant)}::text IS NOT NULL"',
        caught_by=["tests/integration/auth/test_owasp.py", "tests/integration/api/test_listing.py"],
    ),
)
