"""Multiprocessors of a card, and the threads that each holds: torch sizes some temporaries by them.

The catalogue (`data/gpus.json`) says how many most cards have. For others one card of their compute capability counts:
P100, P40, V100, T4, A100, RTX A6000, Jetson AGX Orin, RTX 4090, H100 SXM, B200, B300, RTX 5090, GB10.
Sources: multiprocessors from NVIDIA's whitepapers of these architectures; threads from the CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability".
"""

from typing import NamedTuple


class Processors(NamedTuple):
    """Multiprocessors of a card, and resident threads of each at most."""

    number: int
    threads: int


A100 = Processors(108, 2048)
"""Whose processors count where no card is named."""
BY_CAPABILITY = {
    "6.0": Processors(56, 2048),
    "6.1": Processors(30, 2048),
    "7.0": Processors(80, 2048),
    "7.5": Processors(40, 1024),
    "8.0": A100,
    "8.6": Processors(84, 1536),
    "8.7": Processors(16, 1536),
    "8.9": Processors(128, 1536),
    "9.0": Processors(132, 2048),
    "10.0": Processors(148, 2048),
    "10.3": Processors(148, 2048),
    "12.0": Processors(170, 1536),
    "12.1": Processors(48, 1536),
}


def processors(compute_capability: str, multiprocessors: int | None = None) -> Processors:
    """Those of a card with so many multiprocessors, or, where their number is not known, of the card that counts for a compute
    capability such as `8.0`; for a capability without one, of an A100.
    """
    of_capability = BY_CAPABILITY.get(compute_capability, A100)
    return of_capability if multiprocessors is None else of_capability._replace(number=multiprocessors)
