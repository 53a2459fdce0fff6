"""The files of a checkpoint: written whole, with checksums, in a folder that has one owner."""
