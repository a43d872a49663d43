"""Where CUDA differs from the fake CPU tensors of a trace: each difference as a function without values."""
