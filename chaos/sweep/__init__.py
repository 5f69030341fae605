"""Kill the service at every point of an order's way, and check that it recovers: `python -m chaos.sweep`.

A *point* is a call to Postgres, Redis, the broker, a partner or the client's socket: its place in our code, which call
of that place it is, and whether the process dies before the request leaves it or after the answer has arrived. The
points are recorded from a run of one order (`hooks`), so none is listed by hand and none can be forgotten.

For each point: a service with all roles serves one order and kills itself with SIGKILL exactly there; another one
starts; the client sends the same key again until it gets a 201; when all is quiet, tables and ledger are checked. A
service that did not die at its point is tried again a few times, then the sweep fails: the point proves nothing.
"""
