"""The HTTP server below ASGI: the listening socket, and deadlines and limits for connections."""
