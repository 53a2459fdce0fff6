"""The command line: one file per command, and what its SPEC names."""
