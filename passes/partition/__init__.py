"""The partitioning problem's solvers, as a library: numbers in, a typed solution out, no torch."""
