"""PyTorch's CUDA caching allocator, modelled: replay an event log and read allocated, requested and reserved bytes.

Pure Python without torch. It follows c10/cuda/CUDACachingAllocator.cpp of torch function by function.
"""
