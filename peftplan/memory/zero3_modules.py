"""ZeRO-3 on the tape: the hooks around each module, which gather its parameters before it runs and release them after.

Source: DeepSpeed 0.19.8, runtime/zero/parameter_offload.py; methods have its names. Each module's output and input carry a node,
so that backward fetches a module before its gradient is computed, and releases it after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

from peftplan.arch.modules import Architecture
from peftplan.arch.text_part import is_in_text_part
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import gathers_ahead, limits
from peftplan.distributed.zero3 import Coordinator, Module, Sharded
from peftplan.distributed.zero_shards import sharded_of
from peftplan.memory.methods.adalora import FACTORS, regularizes
from peftplan.memory.model import Model
from peftplan.memory.units import BACKBONE, EMBEDDING, NORM, ROOT, TAIL
from peftplan.memory.units import layer as unit_of_layer
from peftplan.memory.zero_stage import Stage
from peftplan.tape.hooks import hooked
from peftplan.tape.tape import X, Y
from peftplan.tape.tensors import Parameter, Tensor

LAYER = "model.layers.{}"
WRAPPER, TABLE_OF_LAYERS = "model", "embed_tokens_per_layer"
"""The module around a decoder beside towers, and Gemma 4's table of what each layer reads beside the hidden states."""
LEAVES = dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), f"{LAYER}.mlp")
"""Model type → the block of experts that is a module without hooks inside: all of it is gathered at once, and its gradients stay
until the block's backward has ended (runtime/zero/leaf_module_config.py)."""


def has_unlisted_leaves(architecture: Architecture) -> bool:
    """Whether a model has experts that are no leaf unless a tool makes them one, as axolotl, LLaMA-Factory and ms-swift do."""
    return architecture.model_type not in LEAVES and any(block.mlp.num_experts for block in architecture.blocks)


def waits_by_address(architecture: Architecture, distributed: Distributed) -> bool:
    """Whether DeepSpeed may wait for the parameters of experts in any order: those of gpt-oss are a set of four, which Python
    orders by their addresses, and come in several gathers if some come ahead (`fetch_sub_module`)."""
    return architecture.model_type == "gpt_oss" and gathers_ahead(distributed, architecture.hidden_size or 0)


class Habits(NamedTuple):
    """What a trainer and the DeepSpeed that it asks for decide about gathering."""

    follows: bool = True
    """Whether the order that was recorded is used."""
    keeps_in_backward: bool = False
    """Whether backward uses it all the same: one forward without an adapter is like the other."""
    keeps: bool = False
    """Whether what no hook releases stays (`Distributed.keeps_leftovers`)."""
    reloads: bool = False
    """Whether the weights that train have come back from the host before the step, beside the flat ones, to which the optimizer's
    step points them again."""


class Earlier(NamedTuple):
    """What a step leaves to the next one, in whatever world: which modules ran."""

    order: tuple[tuple[str, tuple[int, ...], bool], ...]
    """In their order: the name, the numbers of the parameters, and whether it is a leaf, as of `Module`."""
    readers: frozenset[str]
    """As of `Gathering`."""
    reference: Earlier | None
    """The same of a second model."""
    decided: tuple[tuple[tuple[str, int], frozenset[int]], ...] = ()
    """As of `Coordinator`."""
    follows: bool = False
    """Whether the last forward followed an order: before it is known, a module frees what would persist too."""


class Gathering(Stage):
    """The modules of one rank, whose parameters are gathered while they run. `before`: what the step before left."""

    def __init__(
        self, model: Model, distributed: Distributed, *, dtype: str, habits: Habits, before: Earlier | None = None
    ) -> None:
        super().__init__(model, distributed, dtype=dtype)
        self.keeps = habits.keeps
        hidden_size = model.arch.hidden_size or 0
        self.sharded = sharded_of(model.parameters, distributed, hidden_size)
        self.world_size = distributed.world_size
        own = list(self.sharded.values())
        self.coordinator = Coordinator(
            self.f,
            [Module(name, tuple([own[number] for number in numbers]), leaf) for name, numbers, leaf in before.order]
            if before and (habits.follows or habits.keeps_in_backward)
            else None,
            limits(distributed, hidden_size),
            world_size=self.world_size,
            overlaps=self.overlaps,
            offloads=distributed.offload_params == "cpu",
            inside=self._inside,
            follows=habits.follows,
        )
        self.coordinator.decided = dict(before.decided) if before else {}
        self.running: dict[str, Module] = {}
        """Modules that backward has entered and not left, the last one entered last."""
        self.recomputed: dict[str, list[Sharded]] = {}
        """Module → frozen parameters that were gathered for a recomputation while backward was in it."""
        self.remaining: dict[str, int] = {}
        """Module → backwards until it is released (`ds_grads_remaining`): each call sets it to that of its own."""
        self.readers: set[str] = set(before.readers) if before else set()
        """Modules that have run: of these it is known which parameters of other ones they read."""
        self.persisting = before is not None
        """Whether the step begins with the parameters that the one before has gathered at its end, or left gathered."""
        self.of_leaf = self._leaves(LEAVES.get(model.arch.model_type))
        """Block of experts without hooks inside → its parameters."""
        self.in_leaf = False
        """Whether such a block runs."""
        self.layers = {unit_of_layer(number): LAYER.format(number) for block in model.arch.blocks for number in block.layers}
        """Unit → its module, of layers."""
        self.called: dict[tuple[str, int | None, tuple[Parameter, ...]], Module] = {}
        """Name, layer and parameters of a module that has been called → the module."""
        self.of_module: dict[str, list[Sharded]] = {}
        """Module → its parameters, with those of modules inside."""
        self.of_prompts = tuple(p for p in own if p.name == "prompt_encoder.embedding.weight")
        """The parameter of which the wrapper's forward asks the device (peft, peft_model.py, `get_prompt`)."""
        self.wrapped = () if not model.running.peft_type else ("peft model",) if self.of_prompts else ("peft model", "tuner")
        self.of_loss = model.arch.output_embedding if model.running.loss in ("trl-chunked", "liger") else None
        """A module whose parameters the model's forward reads itself, for the loss."""
        self.reads_table = model.arch.has_towers and model.has(f"{model.arch.decoder}.{TABLE_OF_LAYERS}")
        """Whether the module around the decoder reads a row of its embedding, of a token that stands for pictures."""
        self.of_tuner = tuple(p for p in own if regularizes(model) and p.name.endswith(FACTORS))
        """The parameters that the tuner's forward reads, for a loss of its own: it has them from the second step on."""
        self.reference: Gathering | None = None
        """Those of a second model in an engine of its own."""
        self.f.modules, self.f.linear_in_python = self, True

    @property
    def left(self) -> Earlier:
        """What the step leaves to the next one."""
        ran = self.coordinator.recorded or self.coordinator.order
        order = tuple([(module.name, tuple([p.number for p in module.parameters]), module.leaf) for module in ran])
        reference = None if self.reference is None else self.reference.left
        follows = self.coordinator.recorded is None
        return Earlier(order, frozenset(self.readers), reference, tuple(self.coordinator.decided.items()), follows)

    def call(
        self,
        name: str,
        layer: int | None,
        parameters: tuple[Parameter, ...],
        x: X,
        function: Callable[[X], Y],
        *,
        by_name: bool,
        reads: tuple[Parameter, ...] = (),
    ) -> Y:
        """Call a module on `x`; `by_name`: it takes it as a keyword, which hooks do not see. `reads`: as in `read`."""
        if self.in_leaf or name == self.model.arch.input_embedding:  # which is a unit of its own
            return function(x)
        if self.of_leaf and (inside := self.of_leaf.get(name.format(layer))) is not None:
            leaf = Module(name.format(layer), tuple(inside), leaf=True)
            return cast("Y", self._call_leaf(leaf, x, cast("Callable[[X], Tensor]", function)))
        module = self._module(name, layer, (*parameters, *reads))
        known = module if not reads or module.name in self.readers else self._module(name, layer, parameters)
        self.pre_forward(module, known=known)
        self.readers.add(module.name)
        if isinstance(x, Tensor):
            x = self._called_on(x, module, seen=not by_name)  # type: ignore[assignment]
        elif isinstance(x, tuple):
            x = self._called_on_each(x, module)  # type: ignore[assignment]
        out = function(x)
        for p in module.parameters:
            if p.dtype == "int8":  # the layer points its weight at what it was loaded as, and what was gathered is free
                p.whole = Tensor(None, (p.numel,), p.dtype)
        self.coordinator.release(module)
        if isinstance(out, Tensor):
            return cast("Y", hooked(self.f, out, self.pre_backward, module))
        return cast("Y", tuple(hooked(self.f, x, self.pre_backward, module) for x in cast("tuple[Tensor, ...]", out)))

    def _call_leaf(self, module: Module, x: X, function: Callable[[X], Tensor]) -> Tensor:
        """A block of experts."""
        assert isinstance(x, Tensor)
        self.pre_forward(module)
        x = hooked(self.f, self._called_on(x, module), self._reduce_leaf, module)  # type: ignore[assignment]
        self.in_leaf = True
        try:
            out = function(x)
        finally:  # a recomputation may end within
            self.in_leaf = False
        self.coordinator.release(module)
        return hooked(self.f, out, self.pre_backward, module)

    def _reduce_leaf(self, module: Module) -> None:
        """After the backward of a block of experts."""
        raise NotImplementedError

    def _leaves(self, name: str | None) -> dict[str, list[Sharded]]:
        """The blocks called `name` of layers that have experts, and their parameters."""
        leaves: dict[str, list[Sharded]] = {}
        if name is not None:
            mixtures = {number for block in self.model.arch.blocks if block.mlp.num_experts for number in block.layers}
            for (family, number), p in self.sharded.items():
                if number in mixtures and family.startswith(f"{name}."):
                    leaves.setdefault(name.format(number), []).append(p)
        return leaves

    def _inside(self, module: Module) -> Iterable[Sharded]:
        """The parameters of a module and of all modules inside it."""
        if module.name == ROOT or module.name in self.wrapped:
            return self.sharded.values()
        if module.name not in self.of_module:
            stem = self.layers.get(module.name, module.name)
            within = [p for (family, number), p in self.sharded.items() if family.format(number).startswith(f"{stem}.")]
            self.of_module[module.name] = within or [*module.parameters]
        return self.of_module[module.name]

    def read(self, name: str, layer: int | None, parameter: Parameter) -> bool:
        """A module's forward reads a parameter of another one: it is gathered, and from now on with the module."""
        if not self.in_leaf and not self.f.recomputes:
            self.coordinator.gather_alone(self.sharded[self._key(parameter)])
        return False

    def whole(self, parameter: Parameter) -> Tensor | None:
        """The gathered tensor of a parameter."""
        return self.sharded[self._key(parameter)].whole

    def _module(self, name: str, layer: int | None, parameters: tuple[Parameter, ...]) -> Module:
        key = name, layer, parameters
        if key not in self.called:
            own = dict.fromkeys([self.sharded[p.name, p.layer] for p in parameters])
            self.called[key] = Module(name.format(layer), tuple(own))
        return self.called[key]

    def pre_forward(self, module: Module, *, known: Module | None = None) -> None:
        """`pre_sub_module_forward_function`. Frozen parameters of a recomputation belong to the module that backward is in."""
        self.coordinator.fetch(module, known=known)
        if self.f.recomputes and self.running and not self.keeps:
            frozen = [p for p in module.parameters if not p.trainable]
            last = next(reversed(self.running))
            self.recomputed.setdefault(last, []).extend(frozen)
            for p in frozen:
                p.active.add(last)

    def pre_backward(self, module: Module) -> None:
        """`pre_sub_module_backward_function`."""
        self.running[module.name] = module
        self.coordinator.fetch(module)

    def post_backward(self, module: Module) -> None:
        """`post_sub_module_backward_function`, unless another forward without gradients has called the module since.

        Of a module that is called twice, as DeBERTa's projections of tokens and of positions are, the first backward releases it,
        and the second leaves what it has fetched until all of backward has ended.
        """
        self.remaining[module.name] -= 1
        if self.remaining[module.name]:
            return
        self.running.pop(module.name, None)
        self.coordinator.release(module, dict.fromkeys(self.recomputed.pop(module.name, ())))

    def enter(self, name: str) -> None:
        """Before a part that takes what needs no gradient runs."""
        if name in (NORM, TAIL):
            return
        if name == ROOT:
            self.f.modules = self
            self._gather_persistent()
            self.coordinator.reset_step()
        for module in self._parts(name):
            unread = name in (ROOT, BACKBONE) and name not in self.readers
            self.pre_forward(module, known=Module(module.name, ()) if unread else module)
        self.readers.add(name)

    def enter_with(self, name: str, x: Tensor) -> Tensor:
        """Before a layer runs on `x`."""
        if name in (NORM, TAIL):
            return x
        (module,) = self._parts(name)
        self.pre_forward(module)
        return self._called_on(x, module)

    def _called_on(self, x: Tensor, module: Module, *, seen: bool = True) -> Tensor:
        """What a module is called on, with the hook after its backward (`ds_grads_remaining`). `seen`: the hook sees it."""
        x_hooked = hooked(self.f, x, self.post_backward, module) if seen else x
        self.remaining[module.name] = int(x_hooked is not x)
        return x_hooked

    def _called_on_each(self, inputs: tuple[Tensor, ...], module: Module) -> tuple[Tensor, ...]:
        """The same of a module that takes several tensors: it is released when all their gradients are there."""
        each = tuple(hooked(self.f, x, self.post_backward, module) for x in inputs)
        self.remaining[module.name] = sum(after is not x for after, x in zip(each, inputs, strict=True))
        return each

    def leave(self, name: str, x: Tensor) -> Tensor:
        """After a part gave `x`."""
        if name in (NORM, TAIL):
            return x
        for module in reversed(self._parts(name)):
            self.coordinator.release(module)
            x = hooked(self.f, x, self.pre_backward, module)
        if name == EMBEDDING and self.model.running.shows_picture:
            self._show_picture()
        return x

    def _show_picture(self) -> None:
        """A frozen tower runs, module by module, whose own activations are left out: a few patches."""
        modules: dict[str, list[Sharded]] = {}
        for (family, number), p in self.sharded.items():
            if not is_in_text_part(self.model.arch, family):
                modules.setdefault(family.format(number).rpartition(".")[0], []).append(p)
        for name, parameters in modules.items():
            module = Module(name, tuple(parameters))
            self.pre_forward(module)
            self.coordinator.release(module)

    def _parts(self, name: str) -> list[Module]:
        """The modules that a part consists of, the outermost first."""
        embedding = self.model.arch.input_embedding
        assert embedding is not None
        if name == EMBEDDING:
            return [self._module(embedding, None, (self.model.part(embedding).own_weight,))]
        if name == BACKBONE:  # OPT's head calls `model.decoder` itself
            around = [self._module(WRAPPER, None, (self.model.part(embedding).own_weight,))] if self.reads_table else []
            return [*around, Module(self.model.arch.decoder, ())]
        if name == ROOT:
            read = () if self.of_loss is None else tuple(self.model.part(self.of_loss).params.values())
            inner = [Module(outer, ()) for outer in self.wrapped]
            if self.of_prompts:
                inner = [Module(inner[0].name, self.of_prompts)]
            if self.of_tuner:
                inner[-1] = Module(inner[-1].name, self.of_tuner)
            return [*inner, self._module(ROOT, None, read)]
        return [Module(name, ())]

    def hand_out(self, outputs: list[Tensor]) -> list[Tensor]:
        """Backward begins at whichever output the caller computes its loss from. The first one has its hooks."""
        loss, *others = outputs
        for module in reversed(self._parts(ROOT)):
            others = [hooked(self.f, x, self.pre_backward, module) for x in others]
        return [loss, *others]

    def _gather_persistent(self) -> None:
        """What the step before gathered at its end (`_post_step`), or left gathered of a second model."""
        if self.reference is not None:
            self.reference._gather_persistent()
        for p in self.sharded.values() if self.persisting else ():
            if p.persists:
                self.coordinator.gather_alone(p)
        self.persisting = False
