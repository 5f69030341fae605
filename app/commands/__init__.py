"""The commands for operators: each is its room's work, asked for and told on a terminal."""
