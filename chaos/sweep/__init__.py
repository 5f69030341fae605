"""Kill the service, the janitor and the commands at every point of their way: `python -m chaos.sweep`.

A *point* is a call to Postgres, Redis, the broker, a partner or the client's socket: its place in our code, which call
of that place it is, and whether the process dies before the request leaves it or after the answer has arrived. The
points are recorded from a run of one order (`hooks`), so none is listed by hand and none can be forgotten.

For each point of a scenario (`scenarios`): a process does the work and kills itself with SIGKILL exactly there
(`runs`); the client sends its key again, the operator gives the command again, or another janitor starts; when all is
quiet, tables and ledger are checked. A process that did not die at its point is tried again a few times, then the sweep
fails: the point proves nothing.
"""
