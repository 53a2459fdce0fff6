"""Chooses stages and recomputation: the problem as numbers, the decision that follows."""
