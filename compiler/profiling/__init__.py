"""What is found out by running it on the device at hand: seconds, and how optimizers step."""
