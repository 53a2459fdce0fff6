"""What a forward does besides its results: whether the next call would find it, and where."""
