"""The HTTP API. It translates requests into commands and results into responses, and decides nothing about orders."""
