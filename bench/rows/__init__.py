"""The rows of the table, and the shapes of load: a function each, from the lab and a plan to a comparison."""

from collections.abc import Awaitable, Callable

from bench.lab import Lab
from bench.rounds import Comparison, Plan
from bench.rows.accept import accept
from bench.rows.alone import idle, latency
from bench.rows.finished import finished, finished_dbos
from bench.rows.past import growth, snapshot
from bench.rows.relay import relay
from bench.rows.replay import replay_many, replay_one
from bench.rows.search import search
from bench.rows.shapes import backlog, even_load, flash_sale, long_run, processes, tracing

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
    "search": search,
    "latency": latency,
    "idle": idle,
}
SHAPES: dict[str, Row] = {
    "even-load": even_load,
    "flash-sale": flash_sale,
    "backlog": backlog,
    "processes": processes,
    "tracing": tracing,
    "long-run": long_run,
}
