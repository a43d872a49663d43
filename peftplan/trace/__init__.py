"""What needs torch: architectures read and counted by the real libraries on meta, and real steps traced on fake tensors."""

import logging

# At import bitsandbytes warns of kernels that it lacks, on the CPU or (0.46) on a GPU; nothing here computes with them.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.cextension"):
    logging.getLogger(_name).setLevel(logging.ERROR)
