"""What happens in training steps, recorded while they run and written as a trace."""
