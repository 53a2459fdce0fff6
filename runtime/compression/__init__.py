"""How gradients travel between replicas in fewer bits, and what was not sent is kept for later."""
