"""A step apart from the states of its optimizer: ranks of FSDP1 that run the same operations hold parts of unlike tensors."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftplan.ledger import Line
from peftplan.memory.optimizer import has_temporaries
from peftplan.optim import parse_optim

if TYPE_CHECKING:
    from peftplan.analytic.compile_job import Compiled
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job


def unlike_in_states(job: "Job") -> bool:
    """Whether ranks differ in the states of their optimizer alone: those of FSDP1, unless the optimizer has temporaries of each
    tensor, or makes the states before the first step."""
    if job.distributed is None or job.distributed.strategy != "fsdp1":
        return False
    optimizer = parse_optim(str(job.setup.optim))
    return not has_temporaries(optimizer) and not optimizer.made_with_states


def own_states(inventory: "Inventory", compiled: "Compiled") -> tuple[Line, ...]:
    """The states on the device that a rank's optimizer has in a step."""
    states = (line for line in inventory.static if line.category == "optimizer_states" and line.place == "device")
    return tuple(line for line in states if line.name.rpartition(".")[0] not in compiled.idle)


def without_states(lines: Iterable[Line]) -> tuple[Line, ...]:
    """All other lines."""
    return tuple(line for line in lines if line.category != "optimizer_states")
