"""The `orders` command: one module per group of commands."""
