"""The rows of the table: a function each, from the lab and a plan to a comparison."""

from collections.abc import Awaitable, Callable

from bench.lab import Lab
from bench.rounds import Comparison, Plan
from bench.rows.accept import accept
from bench.rows.alone import idle, latency
from bench.rows.finished import finished, finished_dbos
from bench.rows.past import growth, snapshot
from bench.rows.relay import relay
from bench.rows.replay import replay_many, replay_one

Row = Callable[[Lab, Plan], Awaitable[Comparison]]
ROWS: dict[str, Row] = {
    "accept": accept,
    "replay-one": replay_one,
    "replay-many": replay_many,
    "finished": finished,
    "finished-dbos": finished_dbos,
    "relay": relay,
    "growth": growth,
    "snapshot": snapshot,
    "latency": latency,
    "idle": idle,
}
