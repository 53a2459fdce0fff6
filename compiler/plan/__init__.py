"""What was decided, as data that travels between ranks and into files."""
