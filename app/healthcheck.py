"""The image's health check, `python -m app.healthcheck`: exit with 0 if `/livez` answers where the service listens.

It runs every few seconds, so it imports the standard library alone: the settings would cost more than all the rest.
"""

import os
import re
import urllib.request

EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}  # noqa: S104 - addresses to replace
SECONDS = 2


def address(host: str, port: str) -> str:
    """Return the URL for what ORDERS_HOST and ORDERS_PORT say; see `settings.KUBERNETES_PORT`."""
    reached = EVERYWHERE.get(host, host)
    number = port if re.fullmatch("[0-9]+", port) else "8000"
    return f"http://[{reached}]:{number}/livez" if ":" in reached else f"http://{reached}:{number}/livez"


if __name__ == "__main__":
    url = address(os.getenv("ORDERS_HOST", ""), os.getenv("ORDERS_PORT", ""))
    # Not by `urlopen`: a proxy that the environment names would look for the address on its own machine.
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=SECONDS)
