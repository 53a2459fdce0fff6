"""Which tensors a rank holds: parameters, copies, buffers, gradients."""
