"""The orders service: takes orders over HTTP and drives each to an end, whatever is killed, disconnected or slow.

The way of an order, in reading order:

    api.server       bounds and deadlines for connections, below ASGI
    api.middleware   request id, trace, metric, limit of requests in flight; errors become problems     (api.problems)
    auth             who calls, what they may do, how often                          (guards, tokens, jwks, rate_limit)
    api.orders       the routes: place, cancel, listing, read                      (schemas, long_poll, cursors)
    idempotency      one key, one write: a memory of raw requests, a replay cache in Redis, single flight, and one
                     transaction with the key's row
    orders           order, lines and outbox row in that transaction; commit; 201        (model, money, events, store)
    messaging        outbox, relay, broker (rabbitmq, or local without one), inbox, consumer
    saga             start, plan, orchestrator, gateway: call partners until the order is confirmed or all is undone
    partners         inventory, payment (also Stripe), shipping: one attempt a call, one of four outcomes    (circuit)

For operators: `operations` is what they see and do; `api.ops`, `cli` and `console` show it. `pages` keeps the console's
pages live and checks their forms. `operations.maintenance` resends what a broker lost and removes rows past their
retention.

Around it: `main` and `bootstrap` put the parts of a process together from `settings`; `demo` runs the whole system in
one command, with a page that breaks it (`demo.playground`); `db`, `cache`, `loops`, `observability` and `errors` serve
all rooms. An upper room may import a lower one, never the other way round: `pyproject.toml` holds the contracts.
Outside this package are `sandbox`, the simulator of the partners, and `load`, which loads and judges a running service.
They stand alone; only `cli` and `demo` start them.
"""
