"""Where a rank's tensors get their values from: the model, files, initialisers."""
