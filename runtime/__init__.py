"""Runs what was compiled: `pipeline` is the object that users hold."""
