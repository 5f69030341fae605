"""Write the traces of orders that went wrong after the fact, if they were not sampled when their requests arrived."""
