"""A fault-injecting proxy between the service and a server. It parses the protocol, so it can lose one chosen frame.

In reading order: `faults` lists the faults and their frequency; `frames` is the port to a protocol, and `postgres` and
`amqp` implement it for PostgreSQL and RabbitMQ; `connection` forwards and injects the faults; tests use `proxy`.
"""
