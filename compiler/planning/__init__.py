"""Chooses stages and recomputation: units, what each may keep, the problem, the decision."""
