"""Load the whole system while faults are injected into every part of it, then judge: `python -m chaos.runner`.

A run has two phases, as TigerBeetle's simulator has. *Safety*: clients send orders while a seeded schedule kills,
freezes, restarts, disconnects and slows processes, servers and links, and lets partners fail. Nothing wrong may be
seen. *Liveness*: the faults stop; within LIVENESS_SECONDS of the last one every order has ended, and every event is
published.

Map: `schedule` (which fault when: pure) → `faults` (what each does) → `system` (the processes) → `measure` (samples)
→ `reach` (which dangerous states were met) → `verdict` → `report` (HTML and JSON). The load comes from the package
`load`, whose judge uses HTTP alone; `tests.harness.checker` judges by tables and ledger. Neither knows the other.
"""

LIVENESS_SECONDS = 180.0
