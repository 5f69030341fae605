"""`python -m app` is the `orders` command."""

from app.cli.main import main

main()
