"""The road from a committed row to a handled message. Knows neither orders nor sagas: handlers are injected."""
