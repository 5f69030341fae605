"""Bugs of what is written together: a member of a batch does not keep its own response, error or fencing."""

from chaos.bugs.planting import Bug

BUGS = (
    Bug(
        name="an unknown COMMIT of a batch counts as committed",
        invariant="I1",
        path="app/idempotency/transaction.py",
        good="return [InDoubt(entry.response) if entry in in_doubt else Alone() for entry in entries]",
        bad="return [Committed(entry.response) if entry in in_doubt else Alone() for entry in entries]",
        caught_by=[
            "tests/integration/idempotency/test_batches.py::test_an_unknown_commit_is_resolved_for_each_request"
        ],
    ),
    Bug(
        name="a request gets its neighbour's response",
        invariant="I2",
        path="app/idempotency/transaction.py",
        good="Committed(_stored(entry.response, entry.key, ttl_seconds)) if entry in committed",
        bad="Committed(_stored(chosen[0].response, entry.key, ttl_seconds)) if entry in committed",
        caught_by=["tests/integration/idempotency/test_batches.py::test_concurrent_requests_share_commits"],
    ),
    Bug(
        name="a message whose batch failed counts as handled",
        invariant="I4",
        path="app/messaging/consumer.py",
        good=(
            "            async with db.transaction(self._pool) as conn:\n"
            "                (applied,) = await self._apply_all(conn, handler, [envelope])\n"
        ),
        bad="            applied = _Applied(first=True)\n",
        caught_by=[
            "tests/integration/messaging/test_consumer.py::test_a_message_that_fails_does_not_fail_its_neighbours"
        ],
    ),
    Bug(
        name="both runners of a saga in a batch have written",
        invariant="I4",
        path="app/saga/store.py",
        good="write.claim: _written(write, written[write.claim]) for write in writes if write.claim in written",
        bad=(
            "write.claim: _written(write, row)\n"
            "        for write in writes for claim, row in written.items() if claim[0] == write.saga.id"
        ),
        caught_by=["tests/integration/saga/test_recorder.py::test_two_claims_of_one_saga_in_a_batch"],
    ),
)
