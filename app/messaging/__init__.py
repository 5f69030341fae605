"""Carry each event from its committed outbox row to its handler. Knows neither orders nor sagas: handlers are given."""
