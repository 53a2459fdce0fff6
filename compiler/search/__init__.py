"""The best way to use devices for a batch: bounds prune, sketches put in order, plans decide."""
