"""Graphs that serve many batches: of other sizes, and with other numbers."""
