"""What torch takes while it times a kernel that it compiled, in the first step."""

FLUSHED_BYTES = 256 * 2**20
"""The buffer with which inductor clears the card's cache before it times a kernel (torch,
_inductor/runtime/benchmarking.py, `benchmark_gpu`)."""
UNPACKED = "unpacked"
"""The result of gptqmodel's compiled `dequantize_weight`, which the first step times for each shape."""
COMPILED = ("relu2", UNPACKED)
"""Last words of the names of results of functions that a model's tool compiles."""
