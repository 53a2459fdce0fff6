"""Pipelines inside of other libraries' training loops."""
