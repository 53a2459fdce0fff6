"""A training run on disk, opened under any division; weights to and from Hugging Face."""
