"""What a step does in time, planned or measured, in one form: written, read and compared."""
