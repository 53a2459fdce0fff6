"""What a step did, in numbers, and who is told of it."""
