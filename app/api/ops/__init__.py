"""Routes for operators, below `/ops`."""
