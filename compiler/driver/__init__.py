"""Runs the passes in their order: a batch's shape in, programs, schedule and plan out."""
