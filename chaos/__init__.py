"""Faults on purpose: a proxy between the service and a server, and what it must know to lose the worst byte.

In reading order: `faults` says what can go wrong and how often; `frames` is what the proxy asks of a protocol, and
`postgres` and `amqp` answer that for PostgreSQL and RabbitMQ; `connection` forwards, and does the harm; `proxy` is what
a test holds.
"""
