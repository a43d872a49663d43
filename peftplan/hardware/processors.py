"""Multiprocessors of a card, and the threads that each holds: torch sizes some temporaries by them.

One card stands for all of its compute capability: P100, P40, V100, T4, A100, RTX A6000, RTX 4090, H100 SXM, B200, RTX 5090.
Sources: multiprocessors from NVIDIA's whitepapers of these architectures; threads from the CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability". Left out: other cards of a capability have fewer or more multiprocessors (an L4 58).
"""

from typing import NamedTuple


class Processors(NamedTuple):
    """Multiprocessors of a card, and resident threads of each at most."""

    number: int
    threads: int


A100 = Processors(108, 2048)
"""Whose processors count where no card is named, or where its row says none."""
BY_CAPABILITY = {
    "6.0": Processors(56, 2048),
    "6.1": Processors(30, 2048),
    "7.0": Processors(80, 2048),
    "7.5": Processors(40, 1024),
    "8.0": A100,
    "8.6": Processors(84, 1536),
    "8.9": Processors(128, 1536),
    "9.0": Processors(132, 2048),
    "10.0": Processors(148, 2048),
    "12.0": Processors(170, 1536),
}


def processors(compute_capability: str) -> Processors:
    """Those of the card that stands for a compute capability such as `8.0`; of an A100 for one without."""
    return BY_CAPABILITY.get(compute_capability, A100)
