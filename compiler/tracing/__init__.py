"""What torch.export would change about a model, or leave out, kept while it traces."""
