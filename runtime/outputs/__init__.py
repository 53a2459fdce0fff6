"""What the model returns, of microbatches, replicas and data sets: joined, and scored."""
