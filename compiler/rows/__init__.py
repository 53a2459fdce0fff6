"""What rows of a batch have to do with each other: how microbatches make its outputs and loss."""
