"""Bytes of values, programs and ranks, worked out and not measured."""
