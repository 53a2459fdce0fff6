"""Tensors apart from graphs: without data, and in structures."""
