"""What a job needs besides the card: host memory to load, to offload and to merge, and what its checkpoints take on disk.

Tensors in host memory are counted by their own bytes, and offloaded inputs of layers by the pinned blocks that hold them, without
the interpreter and its libraries. A base whose safetensors file has the dtype that is asked for stays mapped, in pages that the
kernel takes back; a converted one is memory of the process. Both were measured with transformers on the CPU
(tests/planning/test_host_measured.py), pinned memory in rehearsed steps (tests/memory/test_offloaded_checkpoints.py).
Sources: transformers, `modeling_utils.py` and `core_model_loading.py` (`from_pretrained`), `trainer.py` (`_save_checkpoint`,
`rotate_checkpoints`: a new checkpoint is written before the oldest is removed); `deployment/` for files and merges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.deployment import residents
from peftplan.deployment.training_state import GROUPS, Trained, in_order, optimizer_file_bytes, scheduler_file_bytes
from peftplan.errors import PeftplanError
from peftplan.job.job import Job
from peftplan.ledger import Ledger
from peftplan.optim import parse_optim, parse_optim_args, states
from peftplan.parameters import Parameters
from peftplan.planning import finished
from peftplan.results.host import CheckpointFiles, Host, Loading

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed


def host(job: Job, built: Parameters, static: Ledger, offloaded: int) -> Host:
    """What a job needs besides the card; `offloaded` are bytes of checkpointed inputs in host memory."""
    return Host(
        loading=_loading(job, built),
        offloaded=offloaded + static.bytes(place="host"),
        paged=static.bytes(place="managed"),
        merging=_merging(job),
        checkpoint=_checkpoint(job, built),
        save_total_limit=job.setup.save_total_limit,
        ranks=_ranks(job),
        loading_ranks=1 if job.distributed is not None and job.distributed.cpu_ram_efficient_loading else _ranks(job),
        memory=job.setup.host_memory,
    )


def _ranks(job: Job) -> int:
    """Processes of a node."""
    if job.distributed is None or job.distributed.strategy == "device-map":
        return 1
    return job.distributed.gpus or 1


def _loading(job: Job, built: Parameters) -> Loading:
    """Trainer moves a dense model to the card once it is built, so all of it is in host memory first; a quantized one, and one
    that a plain loop loads with `device_map`, go to the card tensor by tensor. `device_map cpu` leaves a quantized one there.
    """
    dense = finished.loaded_parameters(job, adapter_dtype=str(job.setup.adapter_dtype), quant=None)
    base = residents.base_bytes(job.architecture, dense, dtype=job.setup.dtype, device="cpu")
    adapter = residents.adapter_bytes(job.adaptation, dense, dtype=str(job.setup.adapter_dtype), device="cpu")
    largest = max((a.nbytes for p in dense.all if p.owner == "base" for a in p.allocations), default=0)
    if job.setup.device_map == "cpu":
        of_base = (p for p in built.all if p.owner == "base")
        packed = sum(a.nbytes * p.copies for p in of_base for a in p.allocations)
        return Loading(packed, largest, "the whole model, quantized there, of which FSDP2 moves a unit at a time to the card")
    if job.quant is not None:
        return Loading(0, largest, f"tensor by tensor to the card, where each is stored as {job.quant.name}")
    if job.distributed is not None and (job.distributed.facts.loads_on_device or _by_tensor(job.distributed)):
        return Loading(0, largest, "tensor by tensor to the cards")
    if job.setup.adapter_on_device:
        return Loading(
            0, largest, "tensor by tensor to the card (device_map); without it all of the model is in host memory first"
        )
    return Loading(
        base + adapter,
        largest,
        "the whole model, which Trainer then moves to the card (nothing with device_map); a base whose file has the same dtype "
        "is memory-mapped, and only the adapter is private memory",
    )


def _by_tensor(distributed: Distributed) -> bool:
    """Whether a dense model is divided while it loads (`deepspeed.zero.Init`)."""
    return distributed.strategy == "zero3" and distributed.zero3_init is not False


def _merging(job: Job) -> int | None:
    try:
        return finished.merge_on_cpu(job)
    except PeftplanError:
        return None


def _checkpoint(job: Job, built: Parameters) -> CheckpointFiles:
    optimizer = parse_optim(str(job.setup.optim))
    name, size = _model_files(job)
    return CheckpointFiles(
        model_name=name,
        model=size,
        optimizer=optimizer_file_bytes(_trained(job, built), cls=optimizer.cls.rpartition(".")[2]),
        optimizer_exact=optimizer.package == "torch" and optimizer.cls.rpartition(".")[2] in GROUPS,
        scheduler=scheduler_file_bytes(),
    )


def _model_files(job: Job) -> tuple[str, int | None]:
    """The adapter where there is one, else the whole model."""
    for name, size in (("adapter_model.safetensors", finished.adapter_bytes), ("model.safetensors", finished.model_bytes)):
        try:
            return name, size(job)
        except PeftplanError:
            continue
    return "model.safetensors", None


def _trained(job: Job, built: Parameters) -> list[Trained]:
    """Every tensor that trains with its optimizer states."""
    setup, optimizer, args = job.setup, parse_optim(str(job.setup.optim)), parse_optim_args(job.setup.optim_args)
    targets = setup.optim_target_modules or ()
    families = [p for p in built.all if p.trainable]
    of_family = {
        p: states(
            optimizer,
            shape=p.shape,
            dtype=p.dtype,
            name=p.name,
            in_embedding=p.in_embedding,
            in_target=p.is_linear and any(t == "all-linear" or t in p.name for t in targets),
            optim_args=args,
        )
        for p in families
    }
    return [Trained(p.name, order, of_family[p]) for p, order in in_order(families)]
