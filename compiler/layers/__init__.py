"""Layers that repeat in an exported graph: some are differentiated, and copied for the others."""
