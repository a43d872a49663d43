"""A pipeline on the tape: a rank's stages, each a model of its own, and the micro batches that it runs through them.

The hidden states that a stage receives, and the gradients of those that it sent, have a buffer for each micro batch, which the
first step makes. Under FSDP2 what a backward has gathered stays until the next forward, and gradients stay whole until the last
micro batch.

    stage 0 of 2    forward 0 | forward 1 | backward 0 | forward 2 | backward 1 | backward 2 | reduce
    stage 1 of 2    forward 0 | backward 0 | forward 1 | backward 1 | forward 2 | backward 2 | reduce | join the logits

A stage that is no unit itself is left alone by torch's schedule: each layer is gathered when it runs first. NeMo Automodel
reduces what waits behind the last micro batch of a step, or every backward does.

Source: torch, distributed/pipelining/{schedules,stage,_backward,microbatch}.py; distributed/fsdp/_fully_shard/
_fsdp_param_group.py (`post_backward`); nemo_automodel 0.7.0, components/moe/fsdp_mixin.py (`patched_backward_maybe_with_nosync`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from peftplan.distributed.fsdp2 import Fsdp2
from peftplan.distributed.pipeline import Action, Stage
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.units import Unit
from peftplan.job.loss_sizes import NO_UPCAST
from peftplan.ledger import Category
from peftplan.memory.heads import logits_of
from peftplan.memory.lasting import kept_on_card
from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.tensor_parallel import whole_logits
from peftplan.memory.units import ROOT, TAIL, OneGpu
from peftplan.parameters import Parameter as Shard
from peftplan.tape.streams import on_stream
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

STREAMS = 3
"""Streams of a stage's collectives, which its root makes for itself."""
MOST_STAGES = 1 << 10
"""More stages than a rank has."""


class Staged(Fsdp2):
    """The units of one stage, whose gradients wait for `reduce`."""

    number = 0
    """The stage's place among those of its rank."""

    of_step = False
    """Whether `reduce` waits for the last of several runs of the schedule."""

    collects = False
    """Whether all units are being gathered at once."""

    def unshard(self) -> None:
        """Gather all units at once, on the stream that computes (`get_all_gather_streams` of an asynchronous gather)."""
        self.collects = True
        for unit in self.units:
            self._unshard(unit)
        self.collects = False

    def wait(self) -> None:
        """Copy out what `unshard` gathered."""
        for unit in self.units:
            self._wait(unit, forward=False)

    def reshard(self) -> None:
        """Free what is gathered."""
        for unit in self.units:
            self._free(unit)

    def _free(self, unit: Unit) -> None:
        """`free_unsharded_param`: tensor after tensor, the first one first."""
        while unit.unsharded:
            del unit.unsharded[0]

    def post_backward(self, unit: Unit) -> None:
        """The gradients of one micro batch are complete: add them to those that wait."""
        unit.state = "post_backward"
        for p in unit.parameters():
            if p.grad is None or self.reduce_dtype in (None, p.grad.dtype):
                continue
            if p not in self.waiting:
                self.waiting[p] = self._new(p.grad.dims, str(self.reduce_dtype), "gradient to be reduced", 0, "gradients")
            p.grad = None

    def end_backward(self) -> None:
        """`_root_post_backward_final_callback` of a backward that is not the last."""
        for unit in self.units:
            if unit.state != "post_backward":
                self.post_backward(unit)
            unit.state = "idle"

    def reduce(self) -> None:
        """`perform_reduce_grad`: unit after unit, the root first."""
        for unit in self.units:
            places = {member.name: place for place, member in enumerate(unit.members)}
            ready = sorted((p for p in unit.parameters() if p in self.waiting or p.grad), key=lambda p: places[p.name])
            gradients: list[Tensor | None] = []
            for p in ready:
                gradients.append(self.waiting.pop(p, p.grad))
                p.grad = None
            self._free(unit)
            self._reducing.clear()
            if gradients:
                self._reduce(unit, {p.name for p in ready}, gradients)
        super().end_backward()

    def _new(self, dims: Dims, dtype: str, op: str, stream: int, category: Category = "communication") -> Tensor:
        own = 0 if self.collects or not stream else stream + STREAMS * self.number
        return super()._new(dims, dtype, op, own, category)


class HeadApart(Fsdp2):
    """The units of a model that is no unit itself. Its head has streams of its own, since the inner model, which is one, does not
    contain it."""

    of_head = False

    def enter(self, name: str) -> None:
        """Before a unit's forward. The inner model has let the last buffer go when it returned (`FSDPState._post_forward`)."""
        unit = self.by_name.get(self.joined.get(name, name))
        if unit is not None and unit.name == TAIL and not self.f.replays:
            self._copied_out = None
        super().enter(name)

    def _unshard(self, unit: Unit) -> None:
        self.of_head = unit.name == TAIL
        super()._unshard(unit)

    def _reduce(self, unit: Unit, names: set[str], gradients: list[Tensor | None]) -> None:
        self.of_head = unit.name == TAIL
        super()._reduce(unit, names, gradients)

    def _new(self, dims: Dims, dtype: str, op: str, stream: int, category: Category = "communication") -> Tensor:
        own = stream + STREAMS * MOST_STAGES if stream and self.of_head else stream
        return super()._new(dims, dtype, op, own, category)


class StagedApart(HeadApart, Staged):
    """The units of a stage that is no unit itself, of which the schedule gathers and frees none."""

    of_step = True

    def unshard(self) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""

    def reshard(self) -> None:
        """Nothing."""


class StagedAtOnce(StagedApart):
    """The same, whose gradients every backward reduces."""

    def begin_backward(self, *, syncs: bool) -> None:
        """Start a backward."""
        super().begin_backward(syncs=True)

    post_backward = Fsdp2.post_backward
    end_backward = Fsdp2.end_backward

    def reduce(self) -> None:
        """Nothing."""


def kind_of(distributed: Distributed) -> type[Staged]:
    """How the units of a job's stages are gathered and reduced."""
    if distributed.pp_stage_is_unit is not False:
        return Staged
    return StagedAtOnce if distributed.sync_each_batch else StagedApart


class OfRank(OneGpu):
    """The stages of a rank. `steps_over`: the shards of each that train."""

    every_layer = True
    micro_batches = 2

    def __init__(self, stages: tuple[Stage, ...], models: tuple[Model, ...], actions: tuple[Action, ...], chunks: int) -> None:
        self.stages, self.models, self.actions = stages, models, actions
        self.chunks = chunks
        """Micro batches of a run, of which `actions` may leave some out."""
        self.steps_over: tuple[tuple[Shard, ...], ...] = ()
        self.whole: set[str] = set()
        """Families of gradients that no unit reduces."""
        self.outputs: dict[tuple[int, int], Tensor] = {}
        """Stage and micro batch → what backward starts from."""
        self.losses: dict[int, Tensor] = {}
        self.latest: list[Tensor] = []
        self.of_inputs: list[Tensor] = []
        """The gradient of what the latest backward's stage had received."""
        self.sent: list[Tensor] = []
        self.received: list[Tensor | None] = []
        self.gradients: list[Tensor | None] = []
        self.ranks = self._units(0).ranks
        for model in models[1:]:  # all layers of a rank share one dispatcher
            model.dispatcher = models[0].dispatcher

    def _units(self, stage: int) -> Staged:
        units = self.models[stage].units
        assert isinstance(units, Staged)
        return units

    def idle(self, families: set[str]) -> set[str]:
        """The families that no stage has reduced, and of which none has a gradient, as experts have that ranks divide."""
        reduced = {name for stage in range(len(self.models)) for name in self._units(stage).reduced}
        return families - reduced - self.whole

    def before_step(self) -> None:
        """Find the gradients that no unit has."""
        self.whole = {p.name for model in self.models for p in model.with_gradients()}

    def groups(self, trained: list[Shard]) -> Iterable[list[Shard]]:
        """An optimizer for each stage, whose gradients go before the next one steps."""
        names = {p.name for p in trained}
        for stage, shards in enumerate(self.steps_over):
            yield [p for p in shards if p.name in names]
            for unit in self._units(stage).units:
                unit.gradient = None
            for p in self.models[stage].with_gradients():
                p.grad = None

    def begin(self) -> None:
        """Make what the first step makes: rotary tables, and a buffer of each micro batch in each direction."""
        for model in self.models:
            model.micro_batch = 0
            of_rank = model.running.kernels.exchange is not None or any(block.mlp.variant == "moe" for block in model.arch.blocks)
            if model.running.own_decoders and (not of_rank or model is self.models[-1]):
                kept_on_card(model)
        pairs = [*zip(self.stages, self.models, strict=True)]
        self.received = [None if stage.first else self._buffers(model) for stage, model in pairs]
        of_gradients = [None if stage.last else self._buffers(model) for stage, model in reversed(pairs)]
        self.gradients = of_gradients[::-1]

    def _buffers(self, model: Model) -> Tensor:
        tensor = on_stream(model.tape, *self._states(model), "received", 0, "communication")
        model.tape.counts[tensor.storage.number] = self.chunks  # type: ignore[union-attr]
        return tensor

    def _states(self, model: Model) -> tuple[Dims, str]:
        return ("b", model.seq, model.arch.hidden_size), model.running.dtype

    def run(self, f: Tape, batch: dict[str, Tensor], logits: list[Tensor], *, last: bool) -> None:
        """Run the schedule once. `logits`: those of all micro batches, of the run before; replaced. `last`: before the step."""
        logits.clear()
        waits: set[int] = set()
        for model in self.models:
            model.batch = batch
        for action in self.actions:
            units = self._units(action.stage)
            if action.what == "forward":
                f.segment = abs(f.segment) + 1
                f.mark("forward")
            if action.what in ("forward", "backward") and action.stage in waits:
                units.wait()
                waits.remove(action.stage)
            if action.what == "forward":
                self._run_forward(f, action, logits)
            elif action.what == "backward":
                self._run_backward(f, action)
            elif action.what == "unshard":
                units.unshard()
                waits.add(action.stage)
            elif action.what == "reshard":
                units.reshard()
            elif last or not units.of_step:
                units.reduce()
        if logits:
            _joined = f.new((self.chunks, *logits[0].dims), logits[0].dtype, "cat")
        self.latest.clear()
        self.losses.clear()
        self.sent.clear()

    def _run_forward(self, f: Tape, action: Action, logits: list[Tensor]) -> None:
        output = self._forward(action)
        self.latest[:] = [output] * (len(self.models) == 1)
        if self.stages[action.stage].last:
            logits.append(output)
            if action.micro_batch == 1 and output.storage is not None:  # those that are left out
                f.counts[output.storage.number] = self.chunks - max(each.micro_batch for each in self.actions)
            f.module = ""
            whole = whole_logits(f, output)
            dtype = whole.dtype if self.models[action.stage].running.loss == NO_UPCAST else "fp32"
            self.losses[action.micro_batch] = cross_entropy(f, whole, dtype=dtype)
            del whole
        self.outputs[action.stage, action.micro_batch] = output

    def _run_backward(self, f: Tape, action: Action) -> None:
        """`backward_one_chunk`, which holds what the stage gave."""
        stage, units = self.stages[action.stage], self._units(action.stage)
        f.mark("backward")
        f.segment = -(abs(f.segment) + 1)
        output = self.outputs.pop((action.stage, action.micro_batch))
        gradients = self.gradients[action.stage]
        root = output if gradients is not None else self.losses[action.micro_batch]
        pairs = [(root, f.new(root.dims, root.dtype, "ones_like") if gradients is None else gradients.detach())]
        _output = output.detach()
        del output, root
        units.begin_backward(syncs=False)
        f.backward_from(pairs)
        units.end_backward()
        if stage.last:
            self.latest[:] = [x.detach() for x in self.latest]
            self.losses[action.micro_batch] = self.losses[action.micro_batch].detach()
        self.sent[:] = self.of_inputs * (len(self.models) == 1)  # the schedule holds what it sends until it sends the next
        self.of_inputs.clear()

    def _forward(self, action: Action) -> Tensor:
        """`forward_one_chunk`."""
        stage, model = self.stages[action.stage], self.models[action.stage]
        f = model.tape
        model.micro_batch, model.pass_name = action.micro_batch, f"/{action.stage}"
        received = self.received[action.stage]
        if received is None:
            model.units.enter(ROOT)
        else:
            node = Node((0, 0), "", partial(_handed_back, self), (), checkpointed=False)
            leaf = Tensor(received.storage, received.dims, received.dtype, node)
            model.received = model.units.enter_with(ROOT, leaf)
        forward: Callable[[Model], Tensor] = forward_of(
            model.arch.model_type, own_modules=False, own_decoders=model.running.own_decoders, compiled=False
        )
        x = forward(model)
        model.received = None
        if stage.last:
            x = logits_of(model, x)
        x = model.units.leave(ROOT, x)
        model.units.end_forward()
        model.call_locals.clear()
        f.end_autocast()
        return x


def _handed_back(rank: OfRank, f: Tape, node: Node, saved: object, g: Tensor) -> tuple[()]:
    rank.of_inputs.append(g)
    return ()
