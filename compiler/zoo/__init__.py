"""Which models train under stages as they do plainly: tiny ones of every architecture, tried."""
