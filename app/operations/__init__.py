"""What keeps a running system healthy, beside the way of an order."""
