"""Seconds of nodes, programs and schedules, worked out and not measured."""
