"""`python -m app` is the `orders` command."""

from app.cli import main

main()
