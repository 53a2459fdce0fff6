"""Lists of actions per rank: generated, completed by communication, proven legal."""
