"""How tensors get from rank to rank: in memory of one process, of one machine, over a network."""
