"""What the examples share: text that every machine has, options, the comparison with one device."""
