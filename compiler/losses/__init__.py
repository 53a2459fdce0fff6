"""Losses over many classes as operators that make logits a piece at a time."""
