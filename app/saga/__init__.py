"""The saga takes a placed order to `confirmed`, or undoes everything that it attempted.

In reading order: `steps` (the rows) → `plan` (pure functions) → `start`, `cancel` → `store` (the tables) → `runner`
(one saga) → `orchestrator` (many) → `gateway` (calls to partners). Beside them: `facts` (metrics), `queries` (for
operators), `unstarted` and `maintenance` (for background work).
"""
