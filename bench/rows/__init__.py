"""The rows of the table: a function each, from the lab and a plan to a comparison."""

from collections.abc import Awaitable, Callable

from bench.lab import Lab
from bench.rounds import Comparison, Plan
from bench.rows.accept import accept

Row = Callable[[Lab, Plan], Awaitable[Comparison]]
ROWS: dict[str, Row] = {"accept": accept}
