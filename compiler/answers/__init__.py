"""What forward asks the batch in Python: the answers, and how every other batch is asked."""
