"""The weights that are whole on a rank while its policy generates: what ZeRO-3 gathers, and what ms-swift sends to vLLM.

Source: ms-swift 4.6.0, rlhf_trainers/rollout_mixin.py (`_move_full_model_to_vllm`).
"""

from math import prod

from peftplan.distributed.order import in_module_order, tensors
from peftplan.dtypes import ITEMSIZE
from peftplan.job.inventory import Inventory
from peftplan.job.job import Job
from peftplan.memory.timeline import Timeline, timeline
from peftplan.parameters import Parameter, Parameters
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor
from peftplan.units import ceil_div

Placed = list[tuple[Parameter, int | None]]
"""Tensors, each with its layer."""
REQUANTIZED = ("fp32",) * 4
"""Into a weight of 4 bits: that weight dequantized, as the merge before left it, the product, their sum, and what comes back from
the host to be quantized (`deployment.requantize`). The packed weight, an eighth of one of these, is left out."""
BUCKET = 512 * 2**20
"""Bytes of weights that a server gets in one flat copy, unless one has more (`SWIFT_UPDATE_WEIGHTS_BUCKET_SIZE`)."""


def gathered_whole(f: Tape, inventory: Inventory) -> list[Tensor]:
    """All weights, whole on each rank under ZeRO-3, layer by layer (trl, models/utils.py, `_unwrap_model_for_generation`)."""
    return [whole for _, whole in _gathered_of(f, inventory, None)]


def _gathered_of(f: Tape, inventory: Inventory, group: Placed | None) -> list[tuple[Parameter, Tensor]]:
    """The same of a group of tensors; None: of all."""
    distributed = inventory.job.distributed
    if distributed is None or distributed.strategy != "zero3":
        return []
    from peftplan.analytic.ranks import parameters_on_rank

    moved = None if group is None else {(p.name, layer) for p, layer in group}
    in_order = tensors(in_module_order(parameters_on_rank(inventory)))
    taken = (p for p, layer in in_order if moved is None or (p.name, layer) in moved)
    return [(p, f.new(p.shape, p.dtype, f"{p.name} gathered")) for p in taken]


def _largest_bucket(group: Placed) -> int:
    """Bytes of the largest flat copy of the base's weights (ms-swift, rlhf_trainers/utils.py, `_create_parameter_buckets`)."""
    buckets = [0]
    for p in (p for p, _ in group if p.owner == "base"):
        nbytes = p.numel * ITEMSIZE[p.dtype]
        if buckets[-1] and buckets[-1] + nbytes > BUCKET:
            buckets.append(0)
        buckets[-1] += nbytes
    return max(buckets)


def sent(inventory: Inventory) -> Timeline:
    """The base's weights, which vLLM gets before it writes: gathered under ZeRO-3, and on the first rank flat copies for a
    server. Of an adapter, which is merged before, the product of its largest layer in fp32, twice, and in 16 bits.

    Of groups (`move_model_batches`) two are whole at once: a loop names what it has sent while it gathers the next
    (`iter_state_dicts` of rollout_mixin.py).
    """
    job, parameters, *_ = inventory
    f = Tape()
    f.mark("forward")
    merged = max((prod(m.shape("weight")) for m in job.adaptation.matched), default=0)
    before: list[Tensor] = []
    for group in _groups(parameters, job.setup.move_model_batches):
        parts = _parts_from_host(f, job, group)
        gathered = _gathered_of(f, inventory, group)
        del parts
        if job.setup.move_model_batches is not None:
            _add_adapters(f, job, group)
        elif merged:
            into_16_bits = "fp32", "fp32", job.setup.dtype
            dtypes = into_16_bits if job.quant is None else REQUANTIZED
            deltas = [f.new((merged,), dtype, "product of an adapter") for dtype in dtypes]
            del deltas
        before.clear()
        if job.setup.vllm_mode == "server":
            flat = f.new((_largest_bucket(group),), "uint8", "flat copy of weights")
            del flat
        if job.setup.move_model_batches is not None:
            _add_adapters(f, job, group)
        before = [whole for p, whole in gathered if p.owner == "base"]
        del gathered
    f.mark("backward")
    before.clear()
    return timeline(f, {}, vocab=None)


def _parts_from_host(f: Tape, job: Job, group: Placed) -> list[Tensor]:
    """What ranks hold of a group's tensors on the host, which comes to the card for the gather (deepspeed,
    runtime/zero/partition_parameters.py, `_allgather_params_coalesced`). Weights that have left the host are there already."""
    distributed, setup = job.distributed, job.setup
    waits = distributed is not None and distributed.strategy == "zero3" and distributed.offload_params == "cpu"
    if distributed is None or not waits or setup.move_model_batches is None:
        return []
    return [f.new((ceil_div(p.numel, distributed.world_size),), p.dtype, f"{p.name} on its way") for p, _ in group]


def _add_adapters(f: Tape, job: Job, group: Placed) -> None:
    """Adapters are merged into the weights of a group, or taken back, module by module: a product in the dtype of the weight,
    and it times a number (peft, tuners/lora/layer.py:1023; tuners_utils.py, `_move_adapter_to_device_of_base_layer`)."""
    moved = {(p.name, layer) for p, layer in group}
    matched = [(module, layer) for module in job.adaptation.matched for layer in module.layers or (None,)]
    for module, _ in sorted((m for m in matched if (f"{m[0].name}.weight", m[1]) in moved), key=lambda m: m[1] or 0):
        product = f.new(module.shape("weight"), job.setup.dtype, "product of an adapter")
        scaled = f.new(module.shape("weight"), job.setup.dtype, "mul")
        del product, scaled


def _groups(parameters: Parameters, number: int | None) -> list[Placed]:
    """The tensors of a model as they are moved to vLLM (ms-swift, rollout_mixin.py, `split_batches`)."""
    placed = list(tensors(in_module_order(parameters)))
    layers = sorted({layer for _, layer in placed if layer is not None})
    if number is None or not layers:
        return [placed]
    size = ceil_div(len(layers), number)
    groups = [[p for p in placed if p[1] is not None and p[1] // size == group] for group in range(number)]
    return [group for group in (*groups, [p for p in placed if p[1] is None]) if group]
