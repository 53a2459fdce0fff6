"""What travels in fewer bits, as data: the methods, and what each sends, holds and takes."""
