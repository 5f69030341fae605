"""Simulate the three partners (inventory, payment, shipping) in one server that fails on request.

Tests compare the service with the sandbox's ledger, so the sandbox shares no code with the service. It commits
every decision to one SQLite file before it answers; a kill at any time loses no answered call. Serve
`create_app(ledger_path)` with uvicorn and `http=sandbox.http_protocol`, which lets a fault reset a connection.

Map: `app` (routes) → `delivery` (fault injection) → `calls` (idempotency keys) → `inventory`, `payment`,
`shipping` (the partners' decisions) → `ledger` (the file). Beside them: `faults` (fault rules), `connection`
(resets and timeouts), `problems` (error responses), `pages` (the browser's pages).
"""

from sandbox.app import create_app
from sandbox.connection import http_protocol
from sandbox.ledger import Ledger

__all__ = ["Ledger", "create_app", "http_protocol"]
