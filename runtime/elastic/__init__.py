"""Runs that go on when processes are lost or come back: their state in memory, their division."""
