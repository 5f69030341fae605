"""Load a running service with keyed orders from impatient clients, then judge it.

The judge uses what the clients saw, the orders that the service lists, and the partners' ledger, all over HTTP. It
shares no code with the service.

Map: `mix` (what is ordered, and how each client behaves) → `service` (the HTTP calls) → `run` (send, retry, wait,
collect) → `verdict` (pure judgement) → `report` (text and JSON). Beside them: `history` (what the clients saw) and
`progress` (the live line).
"""

from load.history import Histories
from load.mix import OrderMix
from load.report import as_json, as_text
from load.run import LoadConfig, observe, run
from load.service import CannotCheck
from load.verdict import PROMISES, Observed, Verdict, judge

__all__ = [
    "PROMISES",
    "CannotCheck",
    "Histories",
    "LoadConfig",
    "Observed",
    "OrderMix",
    "Verdict",
    "as_json",
    "as_text",
    "judge",
    "observe",
    "run",
]
