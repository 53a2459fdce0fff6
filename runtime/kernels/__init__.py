"""What runs the fusions of programs: compiled by torch's Inductor, once for all that are alike."""
