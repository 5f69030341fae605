"""The partner sandbox: inventory, payment and shipping as one honest server that misbehaves on request.

It stands alone, so that its ledger can judge the service: whatever was answered is in one SQLite file,
committed before the answer left, and survives a kill at any instant. Serve `create_app(ledger_path)` with
uvicorn and `http=sandbox.http_protocol`, which lets a fault reset a connection.

Map: `app` (routes) → `delivery` (faults around a call) → `calls` (the key check) → `inventory`, `payment`,
`shipping` (what the partners decide) → `ledger` (the file); `faults` (rules), `connection` (resets and
silences), `problems`.
"""

from sandbox.app import create_app
from sandbox.connection import http_protocol
from sandbox.ledger import Ledger

__all__ = ["Ledger", "create_app", "http_protocol"]
