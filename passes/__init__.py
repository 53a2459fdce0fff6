"""Rewrites and solvers that need no device and no process; each room works on one thing."""
