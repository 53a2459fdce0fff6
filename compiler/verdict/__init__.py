"""A plan in a sentence: whether it fits, how fast it is, what limits it, what would help most."""
