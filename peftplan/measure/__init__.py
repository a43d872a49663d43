"""Instrumented training steps on a real GPU: the real model with random weights, the step programs of the trace engine, and what
torch's allocator and the driver say of them, phase by phase. Needs the extra `measure` and CUDA."""
