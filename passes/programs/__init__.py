"""A placed graph -> stage programs, and rewrites of these."""
