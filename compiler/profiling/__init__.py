"""Seconds of programs, measured on the device at hand."""
