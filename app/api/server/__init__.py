"""The HTTP server below ASGI: our listening socket, deadlines and bounds for connections."""
