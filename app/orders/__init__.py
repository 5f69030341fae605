"""Orders: what they are, how their status may change, and the transactions that write them."""
