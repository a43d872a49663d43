"""Deep models at the price of shallow ones: a log of a few layers is extended to the full depth.

The log of three equal layers that keep their output for backward; + allocates, - frees, x1 is what layer 0 returns, g1 its
gradient:

    forward     layer 0: +x1            layer 1: +x2            layer 2: +x3
    backward    layer 2: +g2 -x3 -g3    layer 1: +g1 -x2 -g2    layer 0: +g0 -x1 -g1

A middle layer does what its neighbour does, one number on. Each engine uses that from its own side.

Analytic: the tape runs layers 0 and 2 and marks where each begins and ends (`stack`). Layer 1, and every further one, is a copy
of layer 2 that stands before it in forward and after it in backward (`copies`). `sections` says which layers run where they are
of several kinds.

Trace: models of three and of four layers run (`shallow` writes their configs). The log of the larger must be that of the smaller
with layer 1 once more; then layer 1 is repeated up to the model's depth (`expand`, over the records of `log`; `layers` reads the
layer's number in a name).

docs/design.md says why these are two algorithms.
"""
