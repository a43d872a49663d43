"""What needs torch: architectures read and counted by the real libraries on meta, and real steps traced on fake tensors."""

import logging

# At import bitsandbytes warns of a CPU kernel that it lacks; nothing here computes with it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
