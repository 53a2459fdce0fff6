"""What kernels and links reach of peaks, by shape: models of that, a table for each device."""
