"""The partitioning problem as an integer program, and what a solver's answer to it proves."""
