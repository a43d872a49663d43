"""What CUDA does otherwise than the fake CPU tensors of a trace, each as a function without values."""
