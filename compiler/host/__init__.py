"""This process on its machine: its heap, the frames of its interpreter, the caches near by."""
