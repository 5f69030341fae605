"""Idempotent writes: one key stands for one write, whose response is stored with it and replayed."""
