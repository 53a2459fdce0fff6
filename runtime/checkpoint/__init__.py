"""A training run on disk, opened under any division."""
