"""The partners: ports for inventory, payment and shipping (`ports`), their HTTP clients, and the circuit breaker."""
