"""Whole data sets: which rows a process loads, and batches from several processes in step."""
