"""The `orders` command, one module for each group of commands."""
