"""What commands are about: models by name, functions in files, training scripts."""
