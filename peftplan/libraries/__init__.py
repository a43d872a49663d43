"""Models and adapters built by the installed transformers, peft and bitsandbytes on the meta device: no weights, no memory."""

import logging

# At import bitsandbytes warns of kernels that it lacks, on the CPU or (0.46) on a GPU; nothing here computes with them.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.cextension"):
    logging.getLogger(_name).setLevel(logging.ERROR)
