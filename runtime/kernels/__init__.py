"""What runs fusions, compiled once for all that are alike, and which gradients need no making."""
