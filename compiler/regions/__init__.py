"""Submodules that tracing cannot see through: each call runs eagerly inside one node."""
