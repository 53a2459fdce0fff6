"""Runs that go on when processes are lost or come back: their state in memory, their division."""

from . import guarding

guarding.begin()  # before what is imported next, which takes seconds
