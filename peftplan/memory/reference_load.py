"""A reference model that is loaded beside the policy.

Source: trl `DPOTrainer.__init__` (`create_model_from_path`, with `device_map="auto"`); transformers, modeling_utils.py
(`caching_allocator_warmup`).
"""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.allocator.blocks import Block
from peftplan.allocator.core import Allocator
from peftplan.distributed.order import tensors
from peftplan.memory.load import load_order
from peftplan.memory.loaded import Handle, Loader, Memory
from peftplan.parameters import Parameters
from peftplan.units import GIB

MOST_UNTOUCHED = 3 * GIB // 2
"""If more bytes are missing, the warm-up takes one more than is cached, which forces a new segment."""


def load_both(memory: Memory[Handle], load: Loader, reference: Parameters, *, moved: bool) -> None:
    """Load the policy, and then a dense reference model as it arrives on a device map: by name, its buffers last.

    `moved`: several processes load it on the host, and accelerate moves it (`prepare_model`).
    """
    load(memory)
    base = tuple(p for p in reference.all if p.owner == "base")
    if not moved:
        weights = sum(a.nbytes * p.copies for p in base for a in p.allocations)
        memory.release(memory.allocate(warm_up(weights, cached_after(load))))
    _keep(memory, reference._replace(all=base), moved=moved)


def load_with_copy(memory: Memory[Handle], load: Loader, policy: Parameters, *, copy: Parameters) -> None:
    """Load the policy, copy it on its device, and cast the copy; then the trainer's loop empties the cache (axolotl 0.19.0,
    core/trainers/ebft/strided.py:460)."""
    load(memory)
    cast = {p.name: p.allocations for p in copy.all}
    first, second, _ = load_order(policy, by_name=False, moved=True)
    wide = [(p, a, memory.allocate(a.nbytes)) for p, _ in (*first, *second) for a in p.allocations]
    for p, a, handle in wide:
        (narrow,) = cast.get(p.name, (a,))
        if narrow.nbytes != a.nbytes:
            memory.keep((narrow.nbytes,))
            memory.release(handle)
    memory.empty_cache()


def load_after_reference(memory: Memory[Handle], load: Loader, references: Iterable[Parameters], *, last: bool) -> None:
    """Under DeepSpeed: reference and reward model come from the host with `prepare_deepspeed`, the policy when training begins.
    `last`: before them."""
    if last:
        load(memory)
    for each in references:
        _keep(memory, each._replace(all=tuple(p for p in each.all if p.owner == "base")), moved=True)
    if not last:
        load(memory)


def load_beside_teacher(
    memory: Memory[Handle], *, load: Loader, policy: Parameters, teacher: Parameters, shards: Parameters
) -> None:
    """A teacher and the policy, whole on the card; then DeepSpeed divides the teacher, tensor by tensor, and when training begins
    it prepares the policy (ms-swift 4.6.0, pipelines/train/rlhf.py:93, rlhf_trainers/utils.py:361)."""
    of_teacher, of_policy = (
        [memory.allocate(sum(a.nbytes for a in p.allocations)) for p, _ in tensors(model.all)] for model in (teacher, policy)
    )
    parts = [sum(a.nbytes for a in p.allocations) for p, _ in tensors(shards.all)]
    for part, whole in zip(parts, of_teacher, strict=True):
        memory.keep((part,))
        memory.release(whole)
    for p, _ in tensors(teacher.buffers):
        memory.keep(tuple(a.nbytes for a in p.allocations if a.place == "device"))
    for whole in of_policy:
        memory.release(whole)
    load(memory)


def load_one_then(memory: Memory[Handle], first: Loader, second: Loader) -> None:
    """Load the policy, and then a second model (torchtune, recipes/full_dpo_distributed.py, `setup`)."""
    first(memory)
    second(memory)


def load_shards_behind(memory: Memory[Handle], *, load: Loader, shards: Parameters) -> None:
    """The policy, and then the shards of a teacher that are made empty and filled."""
    load(memory)
    for shard in shards.all:
        memory.keep(tuple(a.nbytes for a in shard.allocations if a.place == "device") * shard.copies)


def _keep(memory: Memory[Handle], reference: Parameters, *, moved: bool) -> None:
    first, second, _ = load_order(reference, by_name=not moved, moved=moved)
    for p, _ in (*first, *second):
        memory.keep(tuple(a.nbytes for a in p.allocations if a.place == "device"))


def warm_up(weights: int, cached: int) -> int:
    """Bytes that the warm-up takes and frees where the allocator has cached some: in whole elements of fp16."""
    missing = weights - cached
    forced = cached + 1 if missing > MOST_UNTOUCHED else 0
    return (missing if missing > cached else forced) // 2 * 2


def cached_after(load: Loader) -> int:
    """Bytes that the allocator holds in no tensor once something is loaded."""
    memory = _Allocated()
    load(memory)
    return memory.allocator.reserved - memory.allocator.allocated


class _Allocated:
    """A device whose memory torch's allocator gives out."""

    def __init__(self) -> None:
        self.allocator = Allocator()

    def allocate(self, nbytes: int) -> Block | None:
        """A tensor."""
        return self.allocator.allocate(nbytes)

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Tensors that stay."""
        for nbytes in sizes:
            self.allocator.allocate(nbytes)

    def release(self, tensor: Block | None, /) -> None:
        """Free a tensor."""
        self.allocator.release(tensor)

    def empty_cache(self) -> None:
        """Give cached segments back."""
        self.allocator.empty_cache()
