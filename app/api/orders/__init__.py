"""Routes for customers, below `/orders`."""
