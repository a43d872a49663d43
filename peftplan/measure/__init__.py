"""Instrumented training steps on a real GPU: the real model with random weights runs the step programs of the trace engine.

The peaks of each phase are read from torch's allocator and from the driver. Needs the extra `measure` and CUDA.
"""
