"""The orders service: takes orders over HTTP and drives each to an end, whatever is killed, cut or slow.

The way of an order, in reading order:

    api.connection      below HTTP's semantics: bounds and deadlines for heads and sockets                      (http1)
    api.edge            what every request passes: its id, trace, metric, limits; the last resort        (api.problems)
    api.security        who calls, and what they may do                                        (tokens, jwks, rates)
    api.orders          reads the request, answers it; beside it cancelling, reading, operators, health, pages (schemas)
    api.idempotency     the Idempotency-Key, the request's fingerprint; one request a key, in line for Postgres
                        (admission), a copy of the answer in Redis (copies, `cache`)
    orders.once         one transaction with the key's row, whatever happens to its COMMIT                       (keys)
    orders.service      what is in it: order, lines, outbox row, answer; commit; 201           (models, money, status)
    messaging.outbox    the rows that must reach the broker
    messaging.relay     claim with a lease, publish, mark                  (woken by the commit, polls besides)
    messaging.rabbitmq  the broker: topology, confirmed publishing         (publishing, amqp_connection, undecodable);
                        messaging.local: without one
    messaging.subscription  feeds the consumer from the broker, acknowledges what it did
    messaging.consumer  one transaction: inbox row and the handler's effect; commit; ack
    saga.store          starts the saga of a placed order, keeps its row and its append-only step log
    saga.plan           what to do next, as a pure function of the saga's state and a call's outcome
    saga.cancellation   ends an order before its saga started, or leaves word for the saga to turn back
    saga.orchestrator   load, plan, call a partner, record, until the order is confirmed or everything is undone
    saga.calls          the port of each call; a partner that fails is left alone for a while         (partners.circuit)
    partners.*          inventory, payment (stripe_payment), shipping: a call is tried once and has one of four outcomes
    api.reading         shows the order: one, held back until it has ended (api.waiting), or many, by page

For operators, by `/ops` (api.operators, api.dead_letters, api.sagas) and by the commands, which show the same
(api.views, api.saga_views):

    operations.dead_letters  what was given up, why, what a replay would do; replayed, removed (messaging.dead_letters)
                             (without a broker: parked_letters); on record (audit), as is operations.outbox
    operations.sagas         a saga's pause ended, a saga turned back, each on record (audit)         (saga.reading)

Beside it: `operations.janitor` (sends again what a broker lost, removes what is past its retention; `saga.upkeep`),
`operations.lost_letters` (sends again what was given up and is no dead letter any more; `saga.unstarted`),
`messaging.transport_lease` (all relays and consumers use one transport),
`messaging.backlog` (intake stops while too much waits), `messaging.unpublished` and `messaging.depths` (what waits in
the outbox and in the queues), `api.openapi` and `api.asyncapi` (the documents).

Around it: `cli` and `commands`, `main` and `roles` (put the parts together), `demo` and `embedded` (the whole system in
one command), `db` on `db_session`, `cache`, `loops`, `server`, `telemetry`, `settings`, `errors`. An upper room may
import a lower one, never the reverse; `pyproject.toml` holds the floors. Outside this package: `sandbox`, the simulator
of the partners. It imports nothing from here, and only `cli` and `demo` start it.
"""
