"""The order of a rank's work as a library: seconds and bytes in, the best order found out."""
