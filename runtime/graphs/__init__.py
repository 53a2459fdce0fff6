"""Programs that are recorded once and replayed (CUDA graphs), over memory that keeps its place."""
