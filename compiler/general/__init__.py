"""Graphs that serve many batches: of other sizes, with other numbers; tables too short for them."""
