"""`orders demo`: the whole system in one process, with a PostgreSQL server of its own."""
