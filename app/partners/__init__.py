"""The partners: what the saga asks of inventory, payment and shipping, and how it is asked over HTTP."""
