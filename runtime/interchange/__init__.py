"""Checkpoints to and from the files that others know: `from_pretrained`'s, and peft's."""
