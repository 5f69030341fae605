"""Logs, traces and metrics: how a running service is seen from outside."""
