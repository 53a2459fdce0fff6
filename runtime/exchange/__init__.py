"""How ranks agree, end together, and gather what they divide."""
