"""How a rank loads under ZeRO: the model reaches the device, whole or in parts, then what trains is flattened.

Source: DeepSpeed 0.19.8, runtime/engine.py (`_configure_distributed_model`), runtime/zero/stage_1_and_2.py and stage3.py (the
constructors, `initialize_optimizer_states`), partition_parameters.py (`Init`). Under ZeRO-1 and ZeRO-2, where the card has no
room for a flat copy beside the model, DeepSpeed flattens on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from peftplan.distributed.order import in_module_order, tensors
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import Key, by_tensor, reduce_bucket, trained_groups
from peftplan.dtypes import ITEMSIZE
from peftplan.memory.load import MOVED_LAST, NO_STACKS, load_order
from peftplan.memory.loaded import Handle, Loader, Memory
from peftplan.memory.stacked_load import Stacks
from peftplan.parameters import Parameter, Parameters
from peftplan.units import ceil_div


class FlatLoading(NamedTuple):
    """How a rank loads under ZeRO-1 and ZeRO-2: the whole model first."""

    parameters: Parameters
    """As they are loaded and adapted."""
    cast: Parameters
    """The same in 16 bits."""
    groups: tuple[tuple[frozenset[str], int], ...]
    """The names of a flat group, and the elements of a rank's part."""
    world_size: int
    offloads: bool
    of_one_gpu: Loader | None
    """Loads and adapts a quantized model; None: any other is cast on the host."""
    on_host: bool = False
    """Whether the flat copy is made on the host."""
    stacks: Stacks = NO_STACKS
    """Stacks of experts that are made, one by one, of matrices that have all reached the device (transformers,
    core_model_loading.py, `MergeModulelist`)."""

    def __call__(self, memory: Memory[Handle]) -> None:
        """Load tensor by tensor."""
        trained: dict[str, list[Handle]] = {}
        if self.of_one_gpu is None:
            for p, _ in (tensor for part in load_order(self.cast, by_name=False, moved=True) for tensor in part):
                self._put(memory, p, trained)
        else:
            self._cast_quantized(memory, trained)
        for p in (p for p in self.cast.all if p.name in self.stacks):
            memory.release(memory.allocate(ITEMSIZE[p.dtype] * p.numel))
        half = ITEMSIZE[next((p.dtype for p in self.cast.all if p.trainable), "bf16")]
        for names, part in self.groups:
            memory.empty_cache()
            if self.on_host:
                self._release(memory, names, trained)
                memory.empty_cache()
            memory.keep((half * part * self.world_size,))
            self._release(memory, names, trained)
            copy = memory.allocate(half * part)
            if self.offloads:  # cast on the way
                memory.release(memory.allocate(ITEMSIZE["fp32"] * part))
            else:
                memory.keep((ITEMSIZE["fp32"] * part,))
            memory.release(copy)
        if self.offloads:
            memory.keep((half * max((p.numel for p in self.cast.all if p.trainable), default=0),))
        else:
            zeros = [memory.allocate(ITEMSIZE["fp32"] * part) for _, part in self.groups]
            for handle in zeros:
                memory.release(handle)

    def _release(self, memory: Memory[Handle], names: Iterable[str], trained: dict[str, list[Handle]]) -> None:
        for name in names:
            for handle in trained.pop(name, ()):
                memory.release(handle)

    def _put(self, memory: Memory[Handle], p: Parameter, trained: dict[str, list[Handle]]) -> None:
        if p.trainable:
            trained.setdefault(p.name, []).append(memory.allocate(ITEMSIZE[p.dtype] * p.numel))
        else:
            memory.keep(sizes_of(p))

    def _cast_quantized(self, memory: Memory[Handle], trained: dict[str, list[Handle]]) -> None:
        """Load on the device, then cast tensor by tensor what is not in 16 bits."""
        assert self.of_one_gpu is not None
        cast = {p.name: p for p in self.cast.all}
        moves = {p.name for p in self.parameters.all if p.trainable or cast[p.name].dtype != p.dtype}
        passing = Passing(memory, {sizes_of(p) for p in self.parameters.all if p.name in moves})
        self.of_one_gpu(passing)
        for p, _ in (tensor for part in load_order(self.parameters, by_name=False, moved=True) for tensor in part):
            if p.name in moves:
                self._put(memory, cast[p.name], trained)
                passing.take(sizes_of(p))
        memory.keep(moved_last(self.parameters))


class Passing(Memory[Handle]):
    """A memory where tensors of some sizes are held by handles, since they are cast later."""

    def __init__(self, memory: Memory[Handle], moves: Iterable[tuple[int, ...]]) -> None:
        self.memory = memory
        self.by_size: dict[tuple[int, ...], list[Handle]] = {sizes: [] for sizes in moves}

    def allocate(self, nbytes: int) -> Handle:
        """Allocate a tensor."""
        return self.memory.allocate(nbytes)

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Allocate tensors that stay, or until they are cast."""
        if sizes in self.by_size:
            self.by_size[sizes].append(self.memory.allocate(sizes[0]))
        else:
            self.memory.keep(sizes)

    def release(self, tensor: Handle, /) -> None:
        """Free a tensor."""
        self.memory.release(tensor)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`."""
        self.memory.empty_cache()

    def take(self, sizes: tuple[int, ...]) -> None:
        """Free the oldest tensor of these sizes."""
        if self.by_size[sizes]:
            self.memory.release(self.pop(sizes))

    def pop(self, sizes: tuple[int, ...]) -> Handle:
        """The handle of the oldest tensor of these sizes."""
        return self.by_size[sizes].pop(0)


def moved_last(parameters: Parameters) -> tuple[int, ...]:
    """Bytes of BOFT's permutations, which peft leaves on the host and the engine moves when it has cast a quantized model."""
    moved = (p for p in parameters.buffers if p.name.endswith(MOVED_LAST))
    return tuple(nbytes for p, _ in tensors(moved) for nbytes in sizes_of(p))


def sizes_of(p: Parameter) -> tuple[int, ...]:
    """Bytes of each of a parameter's tensors on the device."""
    return tuple(a.nbytes for a in p.allocations if a.place == "device")


def _by_module(loaded: Iterable[tuple[Parameter, int | None]], alone: Stacks) -> Iterator[list[tuple[Parameter, int | None]]]:
    """The tensors of each module; those that are `alone`, or of which a layer has several, one by one."""

    def module(numbered: tuple[int, tuple[Parameter, int | None]]) -> tuple[str, int | None, int | None]:
        number, (p, layer) = numbered
        several = p.copies > len(p.layers or (layer,))
        return p.name if p.name in alone else p.name.rpartition(".")[0], layer, number if several else None

    for _, group in groupby(enumerate(loaded), key=module):
        yield [tensor for _, tensor in group]


class PartLoading(NamedTuple):
    """How a rank loads under ZeRO-3: tensor by tensor, or the whole model first where it was made without DeepSpeed."""

    parameters: Parameters
    """As they are loaded and adapted."""
    cast: Parameters
    """The same in 16 bits."""
    distributed: Distributed
    hidden_size: int
    half: str
    """The dtype of buckets and of summed gradients."""
    of_one_gpu: Loader | None
    """Loads and adapts a quantized model; None: any other is cast on the host."""
    tied: int
    """Elements of a head that is tied to the embedding."""
    reference: Parameters | None = None
    """Those of a second model, which the trainer loads tensor by tensor before it divides a policy that is whole."""
    converted: Stacks = NO_STACKS
    """Stacks that are made of a checkpoint's matrices, and read one by one (transformers, integrations/deepspeed.py,
    `_apply_weight_conversions_to_state_dict`)."""
    in_fp32: bool = False
    """Whether the model is loaded in fp32: `Init` casts each tensor when torch has made it, on the device (DeepSpeed,
    partition_parameters.py, `zero_wrapper_for_fp_tensor_constructor`)."""

    def __call__(self, memory: Memory[Handle]) -> None:
        """Load tensor by tensor."""
        world = self.distributed.world_size
        trained: dict[Key, tuple[int, Handle | None]] = {}
        divides = by_tensor(self.distributed, quantized=self.of_one_gpu is not None)
        if divides:
            self._by_tensor(memory, self.cast, trained)
        if self.reference is not None:
            self._by_tensor(memory, self.reference, {})
        if not divides:
            self._whole_first(memory, trained)
        groups = [[trained[key] for key in group] for group in trained_groups(self.cast, self.distributed)]
        self._flatten(memory, groups)
        for nbytes, part in (tensor for group in groups for tensor in group):  # hooks are set on whole parameters
            whole = memory.allocate(nbytes * world)
            if part is None:
                memory.release(memory.allocate(nbytes))
            memory.release(whole)

    def _by_tensor(self, memory: Memory[Handle], cast: Parameters, trained: dict[Key, tuple[int, Handle | None]]) -> None:
        """`deepspeed.zero.Init`: the parameters of a module are made whole, then divided, and gathered to be loaded."""
        loaded = list(tensors(p for p in cast.all if p.owner == "base"))
        half = ITEMSIZE[self.half]
        on_device = self.distributed.offload_params in (None, "none")
        of_head = None
        for module in _by_module(loaded, NO_STACKS):
            undivided = [(p, layer, self._cast_when_new(memory, p.numel, p.dtype)) for p, layer in module]
            for p, layer, whole in undivided:
                self._divide(memory, p, layer, whole, trained)
        if self.tied:
            whole = self._cast_when_new(memory, self.tied, self.half)
            of_head = memory.allocate(half * ceil_div(self.tied, self.distributed.world_size)) if on_device else None
            memory.release(whole)
        for module in _by_module(loaded, self.converted):
            parts = [] if on_device or len(module) == 1 else [memory.allocate(self._part(p)) for p, _ in module]
            wholes = [memory.allocate(self._part(p) * self.distributed.world_size) for p, _ in module]
            if not on_device and len(module) == 1:  # `_allgather_params_sequential`; of several, `_allgather_params_coalesced`
                parts = [memory.allocate(self._part(module[0][0]))]
            for gathered in (*parts, *wholes):
                memory.release(gathered)
        if of_head is not None:
            memory.release(of_head)
        self._buffers(memory, cast)
        self._adapt(memory, cast, trained)

    def _cast_when_new(self, memory: Memory[Handle], numel: int, dtype: str) -> Handle:
        wide = memory.allocate(ITEMSIZE["fp32"] * numel) if self.in_fp32 else None
        whole = memory.allocate(ITEMSIZE[dtype] * numel)
        if wide is not None:
            memory.release(wide)
        return whole

    def _adapt(self, memory: Memory[Handle], cast: Parameters, trained: dict[Key, tuple[int, Handle | None]]) -> None:
        """peft makes an adapter whole, on the card and in the dtype of the base, then casts it (tuners/tuners_utils.py,
        `_move_adapter_to_device_of_base_layer`, `cast_adapter_dtype`); DeepSpeed divides it when its engine is made."""
        ordered = list(tensors(p for p in in_module_order(cast) if p.owner == "adapter"))
        wholes = [memory.allocate(ITEMSIZE[self.half] * p.numel) for p, _ in ordered]
        for number, (p, _) in enumerate(ordered):
            if p.dtype != self.half:
                wide = memory.allocate(ITEMSIZE[p.dtype] * p.numel)
                memory.release(wholes[number])
                wholes[number] = wide
        for (p, layer), whole in zip(ordered, wholes, strict=True):
            self._divide(memory, p, layer, whole, trained)

    def _whole_first(self, memory: Memory[Handle], trained: dict[Key, tuple[int, Handle | None]]) -> None:
        """The whole model reaches the device, a quantized one as on one GPU; then all is cast, tensor by tensor."""
        whole: dict[Key, list[Handle]] = {}
        if self.of_one_gpu is None:
            for p, layer in (tensor for part in load_order(self.cast, by_name=False, moved=True) for tensor in part):
                whole.setdefault((p.name, layer), []).append(memory.allocate(ITEMSIZE[p.dtype] * p.numel))
        else:
            passing = Passing(memory, {sizes_of(p)[:1] for p in self.parameters.all})
            self.of_one_gpu(passing)
            by_name, _, added_last = load_order(self.parameters, by_name=True, moved=False)
            for p, layer in (*by_name, *added_last):
                whole.setdefault((p.name, layer), []).append(passing.pop(sizes_of(p)[:1]))
            self._cast(memory, whole)
            memory.keep(moved_last(self.parameters))
        for p, layer in tensors(in_module_order(self.cast)):
            self._divide(memory, p, layer, whole.pop((p.name, layer))[0], trained)

    def _cast(self, memory: Memory[Handle], whole: dict[Key, list[Handle]]) -> None:
        """`_cast_module_mixed_precision`, in the order of `parameters()`."""
        before = {p.name: p.dtype for p in self.parameters.all}
        for p, layer in tensors(in_module_order(self.cast)):
            if p.dtype != before[p.name] and not p.quantized:
                whole[p.name, layer].append(memory.allocate(ITEMSIZE[p.dtype] * p.numel))
                memory.release(whole[p.name, layer].pop(0))

    def _divide(
        self,
        memory: Memory[Handle],
        p: Parameter,
        layer: int | None,
        whole: Handle,
        trained: dict[Key, tuple[int, Handle | None]],
    ) -> None:
        """`_partition_param`. Of int8 weights all stays too, as `CB`."""
        nbytes = self._part(p)
        on_device = self.distributed.offload_params in (None, "none")
        if p.trainable:
            trained[p.name, layer] = nbytes, memory.allocate(nbytes) if on_device else None
        elif on_device:
            memory.keep((nbytes,))
        if not (p.quantized and p.allocations[0].dtype == "int8"):
            memory.release(whole)

    def _part(self, p: Parameter) -> int:
        stored = p.allocations[0]
        dtype, numel = (stored.dtype, stored.numel) if p.quantized else (p.dtype, p.numel)
        return ITEMSIZE[dtype] * ceil_div(numel, self.distributed.world_size)

    def _buffers(self, memory: Memory[Handle], cast: Parameters) -> None:
        for p, _ in tensors(cast.buffers):
            memory.keep(sizes_of(p))

    def _flatten(self, memory: Memory[Handle], groups: list[list[tuple[int, Handle | None]]]) -> None:
        """`_create_fp16_partitions_with_defragmentation`, then `_setup_for_real_optimizer`."""
        flats = [sum(nbytes for nbytes, _ in group) for group in groups]
        handles = [handle for group in groups for _, handle in group if handle is not None]
        for handle in handles:
            memory.release(handle)
        if handles:  # those on the host are flattened there
            memory.empty_cache()
            memory.keep((sum(flats),))
        half, single = ITEMSIZE[self.half], ITEMSIZE["fp32"]
        stored = ITEMSIZE[next((p.dtype for p in self.cast.all if p.trainable), self.half)]
        sizes = [flat // stored for flat in flats]
        if self.distributed.offload_optimizer != "cpu":
            wide: list[Handle] = []  # the loop's variable holds one until there is the next
            for size in sizes:
                wide += [memory.allocate(single * size)] if stored < single else []
                if len(wide) > 1:
                    memory.release(wide.pop(0))
                memory.keep((single * size,))
            for handle in wide:
                memory.release(handle)
            memory.release(memory.allocate(single * max(sizes, default=0)))
        memory.keep((ITEMSIZE[self.distributed.reduced_in(self.half)] * reduce_bucket(self.distributed, self.hidden_size),))
        if self.distributed.offload_optimizer != "cpu":
            memory.keep((half * sum(sizes),))
