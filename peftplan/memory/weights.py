"""The tensors of a job on a tape: parameters by module and layer, and the gradients that are there before the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from peftplan.arch.modules import Architecture
from peftplan.memory.parts import SAVED, TOKEN_ADAPTER, Part, Running
from peftplan.methods.adaptation import Adaptation
from peftplan.parameters import Parameter as Family
from peftplan.parameters import Parameters
from peftplan.storage import QuantConfig
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter, Tensor


@dataclass(eq=False, repr=False)
class Weights:
    """The modules of a model as parts, whose parameters are tensors of one tape."""

    tape: Tape
    arch: Architecture
    parameters: Parameters
    adaptation: Adaptation
    running: Running
    quant: QuantConfig | None
    prefix: str = field(default="", kw_only=True)
    """Before the names of its tensors where another model of the tape has the same."""
    token_adapters: Mapping[str, str] = field(init=False)
    """Module → the module that holds its trained rows."""
    _parts: dict[tuple[str, int | None], Part] = field(init=False, default_factory=dict)
    _families: Mapping[str, list[tuple[Family, str]]] = field(init=False)
    _kinds: Mapping[str, str] = field(init=False)
    _parameters: dict[tuple[str, int | None], Parameter] = field(init=False, default_factory=dict)
    _kept_gradients: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Index the parameters by the module that holds them, adapter tensors by the module that they adapt."""
        self.tape.runs_on = self.running.card
        self._kinds = {m.name: m.kind for m in self.arch.modules}
        owners = sorted((m.name for m in self.adaptation.matched), key=len, reverse=True)
        families: dict[str, list[tuple[Family, str]]] = {}
        for p in self.parameters.all:
            module = p.name.rpartition(".")[0]
            part = p.name[len(module) + 1 :]
            if SAVED in module:
                module = module.replace(SAVED, "")
            elif p.owner == "adapter":
                module = next((name for name in owners if p.name.startswith(f"{name}.")), module)
                part = p.name[len(module) + 1 :]
            families.setdefault(module, []).append((p, part))
        ties_copies = getattr(self.running.config, "ensure_weight_tying", False)
        for tied, original in self.arch.ties:
            module, _, leaf = tied.rpartition(".")
            module_name, _, _ = original.rpartition(".")
            of_original = [(p, leaf) for p, part in families.get(module_name, ()) if part == original.rpartition(".")[2]]
            if of_original:  # before a trainable copy, which takes its place
                families.setdefault(module, []).insert(0, of_original[-1 if ties_copies else 0])
        self._families = families
        own = {name.removesuffix(TOKEN_ADAPTER): name for name in families if name.endswith(TOKEN_ADAPTER)}
        ties = [tuple(name.removesuffix(".weight") for name in tie) for tie in self.arch.ties if tie[0].endswith(".weight")]
        if self.arch.model_type in ("t5", "mt5"):  # `tie_word_embeddings` of their configs is true, whatever was loaded
            ties.append(("lm_head", "shared"))
        ties += [(original, tied) for tied, original in ties]  # RoBERTa's table is the head's
        self.token_adapters = {module: own[other] for module, other in ties if other in own} | own

    def has(self, name: str, layer: int | None = None) -> bool:
        """Whether the model has this module."""
        return bool(self.part(name, layer).params)

    def part(self, name: str, layer: int | None = None) -> Part:
        """A module by its full name, with `{}` for the layer number."""
        key = (name, layer)
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = self._new_part(name, layer)
        return part

    def _new_part(self, name: str, layer: int | None) -> Part:
        params: dict[str, Parameter] = {}
        quantized = False
        if self.arch.task_type == "FEATURE_EXTRACTION" and name not in self._families:
            name = name.partition(".")[2]  # the bare model's names have no prefix
        for p, part in self._families.get(name, ()):
            if p.layers is not None and layer is not None and layer not in p.layers:
                continue
            part = part.removeprefix("ln_tuning_layers.")
            quantized |= p.quantized
            params[part] = self.parameter(p, layer)
        return Part(name, self._kinds.get(name, ""), params, self.quant if quantized else None, layer)

    def parameter(self, p: Family, layer: int | None) -> Parameter:
        """The tensor of a family in a layer, the same at each call."""
        key = (p.name, layer if p.layers is not None else None)
        parameter = self._parameters.get(key)
        if parameter is None:
            dtype = self.running.dtype if p.quantized else p.dtype
            name = self.prefix + p.name
            parameter = self._parameters[key] = Parameter(name, p.shape, dtype, trainable=p.trainable, layer=key[1])
            parameter.grad = self._kept_gradients.get(p.name)
        return parameter

    def used(self, name: str) -> list[Parameter]:
        """The tensors of a family of parameters that the step has used so far."""
        return [p for (family, _), p in self._parameters.items() if family == name]

    def used_in(self, name: str, layer: int | None) -> Parameter | None:
        """The tensor of a family in a layer, where the step has used it; None: of a family outside of the layers."""
        return self._parameters.get((name, layer))

    def used_by_layer(self) -> Iterator[tuple[tuple[str, int | None], Parameter]]:
        """The tensors that the step has used so far, by family and layer."""
        yield from self._parameters.items()

    def with_gradients(self) -> list[Parameter]:
        """The tensors that the step has given a gradient."""
        return [p for p in self._parameters.values() if p.grad is not None]

    def idle(self) -> set[str]:
        """The trainable families that got no gradient in this step; optimizers skip them."""
        trained = {p.name for p in self.parameters.all if p.trainable}
        return trained - {name for (name, _), p in self._parameters.items() if p.grad is not None}

    def keep_gradients(self) -> None:
        """Make all gradients before the step, as `zero_grad(set_to_none=False)` leaves them."""
        for p in self.parameters.all:
            if p.trainable:
                grad = self.tape.many(p.shape, p.dtype, "", p.copies)
                assert grad.storage is not None
                self.tape.category[grad.storage.number] = "gradients"
                self.tape.names[grad.storage.number] = f"{p.name}.grad"
                self._kept_gradients[p.name] = grad

    def forget_gradients(self, families: set[str]) -> None:
        """Drop the gradients that `keep_gradients` made for families that turned out to get none."""
        for family in families & self._kept_gradients.keys():
            storage = self._kept_gradients[family].storage
            assert storage is not None
            self.tape.counts[storage.number] = 0
