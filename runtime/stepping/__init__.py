"""What steps the parameters: the optimizer, clipping, loss scaling."""
