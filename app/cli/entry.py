"""The console script: check what the libraries read while they are imported, then run the command line."""

import os
import sys

# The OpenTelemetry SDK reads these as it is imported, and raises ValueError for a malformed one.
LIMITS = (
    "OTEL_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
)


def main() -> None:
    """Run the command line. A malformed limit ends it with exit code 2 and one line on stderr."""
    for name in LIMITS:
        value = os.environ.get(name, "").strip()
        if not value:
            os.environ.pop(name, None)  # an empty variable means the default
        elif value.lower() != "unset" and not (value.isascii() and value.isdigit()):
            sys.stderr.write(f"orders: {name} must be a whole number that is 0 or more\n")
            sys.exit(2)
    # This service reads and writes W3C trace context alone; the name of an unknown propagator would end the import.
    os.environ["OTEL_PROPAGATORS"] = "tracecontext"
    from app.cli import main as commands  # noqa: PLC0415 - its imports read the variables above

    commands.main()
