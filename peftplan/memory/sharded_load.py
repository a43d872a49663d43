"""How a rank loads under FSDP2: shards are made from the host, or from the whole of a quantized model on the GPU.

Source: as each `distributed.layout` cites it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import NamedTuple

from peftplan.distributed.layout import Layout
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Ledger, Line
from peftplan.memory.load import MOVED_LAST
from peftplan.memory.loaded import Handle, Loader, Memory, Whole, move_states
from peftplan.memory.mxfp4_load import PROJECTIONS, widen_all
from peftplan.memory.unit_groups import Pairs, is_sharded
from peftplan.memory.units import EMBEDDING, FURTHER, ROOT, TAIL, is_of_experts
from peftplan.parameters import Parameter, Parameters

OF_ENGINE = re.compile(r"_proj(_with_mqa)?\.weight$")
"""Linear layers, whose class Transformer Engine has."""


class Loading(NamedTuple):
    """What a rank loads, and from where."""

    groups: dict[str, Pairs]
    buffers: Ledger
    of_one_gpu: Loader | None
    """Loads the whole model onto the GPU first, as a quantized one is; None: shards are made from the host."""
    layout: Layout
    one_by_one: bool
    """Whether each tensor is moved alone (`cpu_ram_efficient_loading`, on rank 0), not all of a unit."""
    stays: Mapping[tuple[int, ...], int]
    """Sizes of tensors of quantized weights that are made together and never sharded, and how many there are."""
    keeps_ends: bool
    """Whether accelerate's own variables hold the embedding and the head whole until the model is prepared."""
    widened: bool = False
    """Whether weights are made anew in fp32 before they are read."""
    in_4_bits: bool = False
    """Whether experts come in 4 bits."""
    reads: bool = True
    """Whether it reads a checkpoint, whose values take the place of the first ones."""
    stacks: bool = False
    """Whether experts are one tensor each, which are read into stacks of all, or those of 4 bits beside them."""
    workspaces: tuple[int, ...] = ()
    """Bytes of each that Transformer Engine takes while weights are read."""
    merged: bool = False
    """Whether experts that are one each in the checkpoint are merged on the host, and all tensors then read from there."""
    in_8_bits: tuple[tuple[int, int], ...] = ()
    """Of each stage whose checkpoint has matrices in 8 bits: bytes of what the rank holds of them in 16, and of the largest stack
    of experts."""
    masks: int = 3
    """Masks of the head's size that `nn.init.trunc_normal_` takes; none where the head is drawn by `normal_`."""
    passing: tuple[int, ...] = ()
    """Bytes of tensors that are there together once all weights are: see `analytic.rank_loading`."""
    keeps_last: bool = False
    """Whether a variable of accelerate holds the last tensor whole until the model is prepared."""
    states: tuple[int, ...] = ()
    """Bytes of each state that the optimizer's constructor made of what trains. Their keys hold the tensors as they were before
    they were divided."""
    casts_shards: bool = False
    """Whether all shards are cast to fp32 once they are made (accelerate, before `versions.FSDP2_UPCASTS_ALL`)."""

    def __call__(self, memory: Memory[Handle]) -> None:
        """Load tensor by tensor."""
        if self.casts_shards:
            self._then_cast(memory)
        elif self.of_one_gpu is not None:
            self._from_whole(memory)
        elif self.layout.loads == "shards":
            self._empty(memory)
        elif self.one_by_one or self.layout.loads == "tensors":
            layers = [name for name in self.groups if name not in (EMBEDDING, TAIL, ROOT)]
            is_tied_first = self.layout.buffers_first and EMBEDDING not in self.groups
            ordered = (TAIL, *layers, ROOT) if is_tied_first else (EMBEDDING, *layers, TAIL, ROOT)  # as in the state dict
            if self.layout.buffers_first:
                self._buffers(memory)
            for name in (name for name in ordered if name in self.groups):
                for p, shard in self.groups[name]:
                    whole = memory.allocate(ITEMSIZE[shard.dtype] * p.numel)
                    keep_shard(memory, shard)
                    memory.release(whole)
            if not self.layout.buffers_first:
                self._buffers(memory)
        else:
            for handle in self._by_unit(memory):
                memory.release(handle)

    def _then_cast(self, memory: Memory[Handle]) -> None:
        """Shards are made as they come, and then cast unit by unit; those of the root last until it is done (torch,
        _fully_shard/_fully_shard.py, `FSDPModule._apply`; _fsdp_param.py, `reset_sharded_param`)."""
        narrow = Whole(memory, {})
        uncast = {name: [(p, _as_made(p, shard)) for p, shard in members] for name, members in self.groups.items()}
        narrowly = self._replace(groups=uncast, casts_shards=False)
        until_end = [] if self.one_by_one else narrowly._by_unit(narrow)
        if self.one_by_one:
            narrowly(narrow)
        layers = [name for name in self.groups if name != ROOT]
        first, *others = self.groups[ROOT]
        of_root = []
        for name, members in ((ROOT, [first]), *((name, self.groups[name]) for name in layers), (ROOT, others)):
            cast = [(p, shard) for p, shard in members if p.dtype != shard.dtype]
            for _, shard in cast:
                memory.keep(_on_device(shard))
            before = [nbytes for p, shard in cast for nbytes in _on_device(_as_made(p, shard))]
            if name == ROOT:
                of_root += before
            else:
                narrow.drop(before)
        narrow.drop(of_root)
        for handle in until_end:
            memory.release(handle)

    def _empty(self, memory: Memory[Handle]) -> None:
        """Shards are made empty, also one of a tied head, which goes when the head is tied again, before a layer for a
        further token is there."""
        if self.workspaces:
            self._drawn(memory)
        if self.widened:
            self._widened(memory)
        own = (members for name, members in self.groups.items() if not (name.startswith(FURTHER) or self.widened))
        for _, shard in chain.from_iterable(own):
            keep_shard(memory, shard)
        tables = [shard for p, shard in self.groups.get(TAIL, ()) if len(p.shape) > 1 and p.owner == "base"]
        of_head = [memory.allocate(n) for shard in tables for n in _on_device(shard)] if EMBEDDING not in self.groups else []
        self._buffers(memory)
        for handle in of_head:
            memory.release(handle)
        for _, shard in chain.from_iterable(pairs for name, pairs in self.groups.items() if name.startswith(FURTHER)):
            keep_shard(memory, shard)
        for handle in [memory.allocate(nbytes) for nbytes in self.passing]:
            memory.release(handle)
        if any(map(is_of_experts, self.groups)) and not self.in_8_bits:
            for masks in [[memory.allocate(shard.numel) for _ in range(self.masks)] for shard in tables]:
                for handle in masks:
                    memory.release(handle)
            beside = [memory.allocate(nbytes) for nbytes in self.workspaces]
            if self.reads and not self.masks:
                self._last_expert(memory)
            if self.reads:
                self._one_by_one(memory)
            for handle in beside:
                memory.release(handle)
        if self.in_4_bits:
            of_experts = (shard for name, pairs in self.groups.items() if is_of_experts(name) for _, shard in pairs)
            workspaces = [memory.allocate(nbytes) for nbytes in (*self.workspaces, *(self._stacks() if self.stacks else ()))]
            widen_all(memory, [shard.numel for shard in of_experts if shard.name.endswith(PROJECTIONS)])
            for handle in workspaces:
                memory.release(handle)
        elif self.stacks:
            self._stacked(memory)
        for stage in self.in_8_bits:
            self._from_8_bits(memory, *stage)
        if self.merged:
            self._from_host(memory)
        memory.empty_cache()

    def _last_expert(self, memory: Memory[Handle]) -> None:
        """A matrix of one expert, which is read whole."""
        pairs = (pair for name, members in self.groups.items() if is_of_experts(name) for pair in members)
        largest = max(sum(_on_device(shard)) // shard.shape[0] for _, shard in pairs)
        memory.release(memory.allocate(largest))

    def _drawn(self, memory: Memory[Handle]) -> None:
        """Transformer Engine's layers are made whole, one after the other (pytorch/module/base.py, `reset_parameters`)."""
        pairs = ((name, p) for name, members in self.groups.items() for p, _ in members if p.owner == "base")
        for p in (p for name, p in pairs if len(p.shape) == 2 and (name == TAIL or OF_ENGINE.search(p.name))):
            memory.release(memory.allocate(ITEMSIZE[p.dtype] * p.numel))

    def _widened(self, memory: Memory[Handle]) -> None:
        """Weights are made anew in fp32, one after the other, and so again in their own dtype, behind the head, whose
        `nn.init.trunc_normal_` takes masks (nemo_automodel 0.7.0, components/models/common/utils.py, `yield_fp32_model`)."""
        shards = [shard for members in self.groups.values() for _, shard in members]
        sizes = [nbytes for shard in shards for nbytes in _on_device(shard)]
        handles = [memory.allocate(nbytes) for nbytes in sizes]
        workspaces = [memory.allocate(nbytes) for nbytes in self.workspaces]
        for number, nbytes in enumerate(sizes):
            narrow, handles[number] = handles[number], memory.allocate(2 * nbytes)
            memory.release(narrow)
        heads = (shard for _, shard in self.groups.get(TAIL, ()) if len(shard.shape) > 1)
        for handle in [*[memory.allocate(shard.numel) for shard in heads for _ in range(3)], *workspaces]:
            memory.release(handle)
        for wide, nbytes in zip(handles, sizes, strict=True):
            memory.keep((nbytes,))
            memory.release(wide)

    def _from_8_bits(self, memory: Memory[Handle], matrices: int, stack: int) -> None:
        """A stage's matrices are made anew in 16 bits, and those of experts then stacked (nemo_automodel 0.7.0,
        components/models/minimax_m2/state_dict_adapter.py, `from_hf`). Left out: the expert that is being stacked."""
        for handle in [memory.allocate(matrices), memory.allocate(stack)]:
            memory.release(handle)

    def _stacked(self, memory: Memory[Handle]) -> None:
        """Experts that are one each are read into stacks of all, and those of one layer once more (nemo_automodel 0.7.0,
        components/moe/experts.py, `GroupedExpertsTE.state_dict`)."""
        stacked = self._stacks()
        stacked += dict.fromkeys(stacked)
        for handle in [memory.allocate(nbytes) for nbytes in (*self.workspaces, *stacked)]:
            memory.release(handle)

    def _stacks(self) -> list[int]:
        """Bytes of each stack of experts."""
        pairs = (pair for members in self.groups.values() for pair in members)
        return [sum(_on_device(shard)) for _, shard in pairs if shard.name.rpartition(".")[0].endswith(".experts")]

    def _from_host(self, memory: Memory[Handle]) -> None:
        """Each tensor is moved whole, and its shard copied; all copies go when the last is there. Those of experts come first in
        a layer, as `block_sparse_moe` does (nemo_automodel 0.7.0, components/checkpoint/checkpointing.py,
        `_load_full_state_dict_into_model`; torch, distributed/_state_dict_utils.py, `_distribute_tensors`)."""
        copies = []
        layers = [name for name in self.groups if name not in (EMBEDDING, TAIL, ROOT)]
        for name in (name for name in (TAIL, EMBEDDING, *layers, ROOT) if name in self.groups):
            pairs = [pair for pair in self.groups[name] if pair[0].owner == "base"]
            for p, shard in sorted(pairs, key=lambda pair: ".experts." not in pair[0].name):
                whole = memory.allocate(ITEMSIZE[shard.dtype] * p.numel)
                copies += [memory.allocate(nbytes) for nbytes in _on_device(shard)]
                memory.release(whole)
        for handle in copies:
            memory.release(handle)

    def _one_by_one(self, memory: Memory[Handle]) -> None:
        """Experts whose columns ranks share are read one by one, and then copied into one tensor of all, which a parameter takes
        last. Variables hold the last expert until the next matrix is made (nemo_automodel 0.7.0,
        components/moe/state_dict_mixin.py, `checkpoint_load_destination`, `_direct_fill_grouped_expert_tensor`)."""
        stacked, read = [], []
        of_experts = (pair for name, pairs in self.groups.items() if is_of_experts(name) for pair in pairs)
        for _, shard in (pair for pair in of_experts if pair[1].shape[-1] < pair[0].shape[-1]):
            (nbytes,), apart = _on_device(shard), 1 + shard.name.endswith("gate_up_proj")
            copies = apart * shard.shape[0]
            read.append((nbytes, [memory.allocate(nbytes // copies) for _ in range(copies)], apart))
        last: list[Handle] = []
        for nbytes, copies_of, apart in read:
            stacked.append(memory.allocate(nbytes))
            for handle in (*copies_of[:-apart], *last):
                memory.release(handle)
            last = copies_of[-apart:]
        for handle in (*last, *stacked):
            memory.release(handle)

    def _by_unit(self, memory: Memory[Handle]) -> list[Handle]:
        """All of a unit is moved, its buffers last, then each tensor leaves its shard (torch, _fully_shard/_fsdp_init.py,
        `_move_states_to_device`). The root comes last. Of an adapter accelerate's loop over what trains holds the last tensor
        whole (accelerate, accelerator.py, `_prepare_fsdp2`). Returns what variables hold until all is prepared.
        """
        move_states(memory, self.states)
        held_until_end = []
        trained = [p for name in self._order() for p, _ in self.groups[name] if p.trainable]
        last = trained[-1] if self.keeps_ends and trained and trained[-1].layers else None
        layers = [name for name in self.groups if name not in (EMBEDDING, TAIL, ROOT)]
        of_layers = [line for line in self.buffers if "{}" in line.name and line.copies == len(layers)]
        for name in self._order():
            whole = [(p, memory.allocate(_whole(p, shard))) for p, shard in self.groups[name]]
            if name in layers:
                for line in of_layers:
                    memory.keep((ITEMSIZE[line.dtype] * prod(line.shape),))
            if name == ROOT:
                self._buffers(memory, beside=of_layers)
            for _, shard in self.groups[name]:
                keep_shard(memory, shard)
            for p, handle in whole:
                if self.states and p.trainable:
                    continue
                is_end = self.keeps_ends and name in (EMBEDDING, TAIL) and len(p.shape) > 1 and p.owner == "base"
                is_last = self.keeps_last and name == ROOT and p is self.groups[name][-1][0]
                if is_end or is_last or (p is last and name == layers[-1]):
                    held_until_end.append(handle)
                else:
                    memory.release(handle)
        return held_until_end

    def _from_whole(self, memory: Memory[Handle]) -> None:
        """The whole model is there until all shards are, since `fsdp2_prepare_model` holds its state dict; or a unit, until its
        shards are. BOFT's permutations, which peft leaves on the host, are moved with their units."""
        assert self.of_one_gpu is not None
        by_unit = self.layout.streams or self.layout.loads == "model"
        whole = Whole(memory, self.stays)
        self.of_one_gpu(whole)
        layers = {name for name in self.groups if name not in (EMBEDDING, TAIL, ROOT)}
        on_host = [line for line in self.buffers if line.name.endswith(MOVED_LAST)]
        for name in self._order() if by_unit else self.groups:
            for line in on_host if name in layers else ():
                memory.keep((ITEMSIZE[line.dtype] * prod(line.shape),))
            for p, shard in self.groups[name]:
                memory.keep(
                    tuple(a.nbytes for a in shard.allocations if a.place == "device" and (a.name == "weight" or not p.quantized))
                )
            if by_unit:
                for p, _ in self.groups[name]:
                    whole.drop(a.nbytes for a in p.allocations if a.name == "weight" or not p.quantized)
        whole.drop([nbytes for nbytes, handles in whole.handles.items() for _ in handles])
        if self.layout.streams:
            memory.empty_cache()

    def _order(self) -> list[str]:
        ends = (EMBEDDING, TAIL, ROOT)
        return [*(name for name in self.groups if name not in ends), *(name for name in ends if name in self.groups)]

    def _buffers(self, memory: Memory[Handle], *, beside: Sequence[Line] = ()) -> None:
        for line in (line for line in self.buffers if line not in beside):
            memory.keep((ITEMSIZE[line.dtype] * prod(line.shape),) * line.copies)


def load_empty(memory: Memory[Handle], *, load: Loader, head: int) -> None:
    """One GPU: all tensors are made empty and then filled, also a tied head, of `head` bytes, until it is tied again."""
    load(memory)
    memory.release(memory.allocate(head))
    memory.empty_cache()


def _as_made(p: Parameter, shard: Parameter) -> Parameter:
    """A shard before it is cast."""
    return shard._replace(dtype=p.dtype, allocations=tuple(a._replace(dtype=p.dtype) for a in shard.allocations))


def keep_shard(memory: Memory[Handle], shard: Parameter) -> None:
    """A shard is made on the device, also one that goes to the host."""
    memory.keep(_on_device(shard))
    for a in shard.allocations:
        if a.place == "host":
            memory.release(memory.allocate(a.nbytes))


def _whole(p: Parameter, shard: Parameter) -> int:
    """Bytes of a tensor before it is divided; of a quantized weight those of its packed elements."""
    return next(a.nbytes for a in p.allocations if a.name == "weight") if p.quantized else ITEMSIZE[shard.dtype] * p.numel


def _on_device(shard: Parameter) -> tuple[int, ...]:
    return tuple(a.nbytes for a in shard.allocations if a.place == "device")


def whole_sizes(full: Parameters, shards: Parameters) -> Mapping[tuple[int, ...], int]:
    """Sizes of what every rank holds of quantized weights, and how many there are: absmax and code tables, and packed weights
    that are not sharded. An adapter of such a size is loaded behind them.
    """
    sizes: Counter[tuple[int, ...]] = Counter()
    for p, shard in zip(full.all, shards.all, strict=True):
        if p.quantized:
            sizes[tuple(a.nbytes for a in p.allocations if a.name != "weight")] += p.copies
            if not is_sharded(p, shard):
                sizes[tuple(a.nbytes for a in p.allocations if a.name == "weight")] += p.copies
    return sizes
