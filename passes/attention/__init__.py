"""Attention in the exported forward: as untraced models call it, by a device's kernels."""
