"""Verify the invariants of a running system, from its tables, its broker and its partners' ledgers.

A pass (`run`) reads the orders in pages, each page in one statement, so that its rows belong together (`snapshot`).
Then it reads what the partners have for the same orders (`books`), and judges only what the snapshot shows as final:
the partners have been called for the last time by then. One module per group of invariants judges. Only `keys` and
`overdue` also read, since their rows are not found by their orders.

    I1, I9 `records`   I1, I2, I9 `keys`   I3 `events`   I4 `effects`   I5, I7 `balances`   I6 `overdue`   I8 `limits`

A suspicion is not a violation yet. The pass looks at it again, after the time that a call or a lease may still take,
and reports only what is still wrong. What cannot be read is reported as not checked, never as fine.
"""
