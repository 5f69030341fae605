"""Authenticate callers, check their scopes, and limit their request rates."""
