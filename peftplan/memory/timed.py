"""What torch takes while it times a kernel that it compiled, in the first step."""

FLUSHED_BYTES = 256 * 2**20
"""The buffer with which inductor clears the card's cache before it times a kernel (torch,
_inductor/runtime/benchmarking.py, `benchmark_gpu`)."""
