"""`orders demo`: the whole system in one command: a supervisor, and a PostgreSQL server, service and sandbox."""
