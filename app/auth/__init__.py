"""Who calls, what they may do and how often: tokens, guards and rate limits."""
