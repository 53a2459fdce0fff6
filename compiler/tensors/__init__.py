"""Tensors apart from graphs: without data, in structures, and as digests."""
