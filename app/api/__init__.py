"""HTTP: translates requests into commands and results into answers. Decides nothing about orders."""
