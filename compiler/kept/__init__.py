"""Graphs on disk, so that a second run need not trace what a first one has traced."""
