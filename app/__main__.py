"""`python -m app` is the `orders` command."""

from app.cli.entry import main

main()
