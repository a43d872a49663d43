"""The options of the matrix: for one architecture, what each method is asked to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from peftplan.arch.modules import LINEAR_KINDS, Architecture
from peftplan.methods import METHODS

Options = dict[str, Any]


class Names:
    """Names of one architecture that the options use."""

    def __init__(self, arch: Architecture) -> None:
        layered = [m for m in arch.modules if m.kind in LINEAR_KINDS and m.layers is not None]
        leaves = list(dict.fromkeys(m.leaf for m in layered))
        self.first, self.last = leaves[0], leaves[-1]
        self.pair = [self.first, self.last]
        self.regex = rf".*\.({'|'.join(map(re.escape, self.pair))})"
        self.one_full = list(layered[-1].names())[-1]
        self.stack = layered[0].name.partition(".{}")[0].rpartition(".")[2]
        self.container = layered[0].name.rpartition(".")[0].rpartition(".")[2]
        self.embedding = (arch.input_embedding or "").rpartition(".")[2]
        self.head = (arch.output_embedding or "").rpartition(".")[2]
        self.norms = list(dict.fromkeys(m.leaf for m in arch.modules if m.kind in ("LayerNorm", "RMSNorm")))
        self.odd = list(dict.fromkeys(m.leaf for m in arch.modules if m.kind not in (*LINEAR_KINDS, "Embedding")))
        self.expert_params = [
            f"{m.leaf}.{p}" for m in arch.modules if m.kind.startswith("Experts") for p, shape in m.params if len(shape) == 3
        ]
        self.roles = {
            **dict.fromkeys(self.odd, "odd"), **dict.fromkeys(self.norms, "norm"), **dict.fromkeys(self.expert_params, "experts"),
            self.embedding: "embedding", self.head: "head", self.stack: "stack", self.container: "container",
            self.last: "last", self.first: "first", self.one_full: "one",
        }  # fmt: skip

    def without_names(self, value: Any) -> Any:
        """A value of an option with what a name is in its model in place of the name, which other models have too."""
        if isinstance(value, dict):
            return tuple((self.without_names(key), self.without_names(part)) for key, part in value.items())
        if isinstance(value, (list, tuple)):
            return tuple(map(self.without_names, value))
        if not isinstance(value, str) or value in self.roles:
            return self.roles.get(value, value) if isinstance(value, str) else value
        return re.sub(r"\w+", lambda word: self.roles.get(word[0], word[0]), value.replace(self.one_full, "one"))


def cases(method: str, arch: Architecture) -> list[Options]:
    """The options of a method on an architecture."""
    names = Names(arch)
    if METHODS[method].peft_type == "LORA" and method not in LISTS:
        return list(_lora_kin(names))
    return list(LISTS[method](names))


def task_cases(method: str, arch: Architecture) -> list[Options]:
    """The options of a method on a model with another head."""
    names = Names(arch)
    if method in VIRTUAL:
        return [{"num_virtual_tokens": 4}]
    some: list[Options] = [
        {"target_modules": "peft-default"}, {"target_modules": "all-linear"}, {"target_modules": names.pair},
        {"target_modules": names.regex, "modules_to_save": [names.last]},
    ]  # fmt: skip
    if method == "adalora":
        some = [options | ADALORA for options in some]
    if method == "ia3":
        some = [o | {"feedforward_modules": [names.last] if isinstance(o["target_modules"], list) else None} for o in some]
    if method == "ln-tuning":
        return [{"target_modules": "peft-default"}, {"target_modules": names.norms[:1] or names.pair}]
    return some


ADALORA: Options = {"total_step": 100}
"""peft asks for the number of training steps, which changes no tensor; peftplan counts without it too."""
VIRTUAL = ("prefix-tuning", "prompt-tuning", "p-tuning")


def _targets(names: Names) -> Iterator[Options]:
    """Every way to choose targets, and what restricts or accompanies them."""
    for targets in ("all-linear", "peft-default", "attention", "mlp", names.pair, names.regex, [names.one_full]):
        yield {"target_modules": targets}
    pair: Options = {"target_modules": names.pair}
    yield {"target_modules": ["no_such_module"]}
    yield {"target_modules": [names.container]}
    yield {"target_modules": "all-linear", "exclude_modules": [names.first]}
    yield {"target_modules": names.regex, "exclude_modules": rf".*\.1\..*\.{names.first}"}
    yield pair | {"exclude_modules": names.pair}
    if names.head:
        yield pair | {"modules_to_save": [names.head]}
        yield {"target_modules": "all-linear", "modules_to_save": [names.head]}
        yield {"target_modules": [names.first, names.head]}
    if names.embedding:
        yield {"target_modules": "all-linear", "modules_to_save": [names.embedding]}
    if names.norms:
        yield pair | {"modules_to_save": names.norms[:1]}
        yield {"target_modules": [names.first, names.norms[0]]}
    yield {"target_modules": [names.first], "modules_to_save": [names.last]}
    yield pair | {"modules_to_save": [names.container]}


def _layers(names: Names) -> Iterator[Options]:
    pair: Options = {"target_modules": names.pair}
    yield pair | {"layers_to_transform": [0, 2]}
    yield pair | {"layers_to_transform": 1, "layers_pattern": names.stack}
    yield pair | {"layers_to_transform": [1], "layers_pattern": "no_such_stack"}
    yield pair | {"layers_to_transform": [99]}
    yield pair | {"layers_pattern": names.stack}
    yield {"target_modules": "all-linear", "layers_to_transform": [1]}
    yield {"target_modules": names.regex, "layers_to_transform": [1]}
    yield {"target_modules": names.regex, "layers_to_transform": [1], "layers_pattern": names.stack}


def _biases(names: Names, only: str) -> Iterator[Options]:
    yield {"target_modules": names.pair, "bias": "all"}
    yield {"target_modules": names.pair, "bias": only}
    yield {"target_modules": "all-linear", "bias": only}


def _ranks(names: Names) -> Iterator[Options]:
    yield {"target_modules": "all-linear", "r": 5}
    yield {"target_modules": names.pair, "r": 6, "rank_pattern": {names.first: 3}}
    yield {"target_modules": "all-linear", "rank_pattern": {rf"{names.stack}.1..*{names.last}": 11, f"^{names.one_full}": 2}}


def _lora(names: Names) -> Iterator[Options]:
    pair: Options = {"target_modules": names.pair}
    yield from _targets(names)
    yield from _layers(names)
    yield from _biases(names, "lora_only")
    yield from _ranks(names)
    yield {"target_modules": "all-linear", "use_dora": True}
    yield pair | {"lora_bias": True}
    yield {"target_modules": "all-linear", "lora_bias": True, "r": 3}
    yield pair | {"lora_bias": True, "use_dora": True}
    yield pair | {"use_rslora": True, "lora_alpha": 32, "lora_dropout": 0.1}
    yield pair | {"init_lora_weights": "gaussian"}
    yield {"target_modules": names.norms[:1] or names.odd[:1]}
    yield {"target_modules": names.odd[:1] or names.pair}
    yield from _lora_tokens(names)
    yield from _lora_parameters(names)


def _lora_tokens(names: Names) -> Iterator[Options]:
    if not names.embedding:
        return
    pair: Options = {"target_modules": names.pair}
    yield {"target_modules": [names.embedding]}
    yield {"target_modules": [names.first, names.embedding], "use_dora": True, "r": 4}
    yield {"target_modules": [names.first, names.embedding], "lora_bias": True}
    yield {"target_modules": [names.embedding], "bias": "all", "rank_pattern": {names.embedding: 2}}
    yield pair | {"trainable_token_indices": [0, 5, 7]}
    yield {"target_modules": "all-linear", "trainable_token_indices": {names.embedding: [1]}}
    yield pair | {"trainable_token_indices": {names.embedding: [1, 2]}, "modules_to_save": [names.embedding]}
    if names.head:
        yield pair | {"trainable_token_indices": {names.embedding: [1, 2], names.head: [1, 2]}}
        yield pair | {"trainable_token_indices": {names.embedding: [1, 2]}, "modules_to_save": [names.head]}


def _lora_parameters(names: Names) -> Iterator[Options]:
    yield {"target_modules": names.pair, "target_parameters": ["no.such_parameter"]}
    yield {"target_modules": [names.first], "target_parameters": [f"{names.last}.weight"], "r": 4}
    yield {"target_modules": [names.first], "target_parameters": [f"{names.first}.weight"]}
    yield {"target_modules": [], "target_parameters": [f"{names.last}.weight"], "r": 4}
    yield {"target_modules": "peft-default", "target_parameters": [f"{names.last}.weight"], "r": 4}
    yield {"target_modules": []}
    for parameter in names.expert_params[:2]:
        yield {"target_modules": [names.first], "target_parameters": [parameter], "r": 4}
    if names.expert_params:
        every = names.expert_params
        yield {"target_modules": [names.first], "target_parameters": every, "r": 3}
        yield {"target_modules": [names.first], "target_parameters": every, "use_dora": True}
        yield {"target_modules": [names.first], "target_parameters": every, "lora_dropout": 0.1}
        yield {"target_modules": "all-linear", "target_parameters": every, "r": 2}
        yield {"target_modules": [names.first], "target_parameters": every, "rank_pattern": {every[-1]: 5}}


def _lora_kin(names: Names) -> Iterator[Options]:
    """What is LoRA under another name: a few of its options."""
    for targets in ("all-linear", "peft-default", names.pair, names.regex):
        yield {"target_modules": targets}
    yield from _biases(names, "lora_only")
    yield {"target_modules": names.pair, "r": 6, "rank_pattern": {names.first: 3}}
    if names.head:
        yield {"target_modules": "all-linear", "modules_to_save": [names.head], "r": 64}
    if names.embedding:
        yield {"target_modules": [names.embedding, names.last]}


def _lora_fa(names: Names) -> Iterator[Options]:
    for options in _lora_kin(names):
        yield options | {"lora_alpha": 16}


def _adalora(names: Names) -> Iterator[Options]:
    for options in (
        {"target_modules": "all-linear"}, {"target_modules": "peft-default"}, {"target_modules": names.pair, "init_r": 5},
        {"target_modules": names.regex, "bias": "lora_only"}, {"target_modules": names.pair, "layers_to_transform": [1]},
        {"target_modules": names.pair, "modules_to_save": names.norms[:1] or [names.last]},
        {"target_modules": [names.embedding or names.last]}, {"target_modules": names.norms[:1] or names.odd[:1]},
    ):  # fmt: skip
        yield options | ADALORA


def _loha(names: Names) -> Iterator[Options]:
    yield from _targets(names)
    yield from _layers(names)
    yield from _ranks(names)


def _lokr(names: Names) -> Iterator[Options]:
    yield from _loha(names)
    yield {"target_modules": "all-linear", "decompose_both": True, "r": 3}
    yield {"target_modules": "all-linear", "decompose_factor": 4, "r": 2}
    yield {"target_modules": names.pair, "decompose_factor": 5, "decompose_both": True, "r": 1}
    yield {"target_modules": names.pair, "r": 1000}


def _vera(names: Names) -> Iterator[Options]:
    for options in _targets(names):
        yield {"r": 16} | options
    yield from _layers(names)
    yield from _biases(names, "vera_only")


def _ia3(names: Names) -> Iterator[Options]:
    ff: Options = {"feedforward_modules": [names.last]}
    for options in _targets(names):
        within = isinstance(options["target_modules"], str) or names.last in options["target_modules"]
        yield options | ff if within else options
    yield {"target_modules": "all-linear", "feedforward_modules": []}
    yield {"target_modules": "all-linear"}
    yield {"target_modules": names.pair}
    yield {"target_modules": names.pair, "feedforward_modules": ["no_such_module"]}
    yield {"target_modules": names.regex, "feedforward_modules": rf".*\.{names.first}"}


def _oft(names: Names) -> Iterator[Options]:
    yield from _targets(names)
    yield from _layers(names)
    yield from _biases(names, "oft_only")
    yield {"target_modules": "all-linear", "oft_block_size": 8}
    yield {"target_modules": "all-linear", "oft_block_size": 0, "r": 5}
    yield {"target_modules": "all-linear", "oft_block_size": 8, "r": 5}
    yield {"target_modules": names.pair, "oft_block_size": 0, "r": 0}
    yield {"target_modules": names.pair, "oft_block_size": 7, "block_share": True}
    yield {"target_modules": names.pair, "oft_block_size": 4096, "coft": True}
    if names.embedding:
        yield {"target_modules": [names.embedding, names.first], "oft_block_size": 16}


def _boft(names: Names) -> Iterator[Options]:
    yield from _targets(names)
    yield from _layers(names)
    yield from _biases(names, "boft_only")
    yield {"target_modules": names.pair, "boft_block_size": 2}
    yield {"target_modules": names.pair, "boft_block_size": 7}
    yield {"target_modules": names.pair, "boft_block_size": 0, "boft_block_num": 4}
    yield {"target_modules": names.pair, "boft_block_size": 4, "boft_block_num": 4}
    yield {"target_modules": names.pair, "boft_block_size": 2, "boft_n_butterfly_factor": 2}
    yield {"target_modules": names.pair, "boft_block_size": 4, "boft_n_butterfly_factor": 3}


def _fourierft(names: Names) -> Iterator[Options]:
    for options in _targets(names):
        yield {"n_frequency": 60} | options
    yield from _layers(names)
    yield from _biases(names, "fourier_only")
    yield {"target_modules": names.pair, "n_frequency": 50, "n_frequency_pattern": {names.first: 20}}
    yield {"target_modules": names.pair, "n_frequency": 10**8}


def _ln_tuning(names: Names) -> Iterator[Options]:
    yield {"target_modules": "peft-default"}
    for norm in names.norms:
        yield {"target_modules": [norm]}
    if names.norms:
        yield {"target_modules": names.norms}
        yield {"target_modules": rf".*\.1\..*{names.norms[0]}"}
        yield {"target_modules": names.norms, "modules_to_save": [names.last]}
        yield {"target_modules": names.norms, "modules_to_save": names.norms[-1:]}
        yield {"target_modules": names.norms, "exclude_modules": names.norms[:1]}
    yield {"target_modules": names.pair}
    yield {"target_modules": [names.container]}
    if names.embedding:
        yield {"target_modules": [names.embedding]}


def _virtual(names: Names) -> Iterator[Options]:
    for tokens in (1, 20):
        yield {"num_virtual_tokens": tokens}
    yield {"num_virtual_tokens": 4, "num_attention_heads": 4}
    yield {"num_virtual_tokens": 4, "num_layers": 2, "token_dim": 48, "num_attention_heads": 6}
    yield {"num_virtual_tokens": 4, "num_transformer_submodules": 2}
    if names.norms:
        yield {"num_virtual_tokens": 3, "modules_to_save": names.norms[:1]}


def _prefix(names: Names) -> Iterator[Options]:
    yield from _virtual(names)
    yield {"num_virtual_tokens": 5, "prefix_projection": True}
    yield {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 40}


def _p_tuning(names: Names) -> Iterator[Options]:
    yield from _virtual(names)
    for kind in ("MLP", "LSTM"):
        yield {"num_virtual_tokens": 5, "encoder_reparameterization_type": kind, "encoder_hidden_size": 40}
    yield {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}


LISTS: dict[str, Callable[[Names], Iterator[Options]]] = {
    "lora": _lora, "lora-fa": _lora_fa, "adalora": _adalora, "loha": _loha, "lokr": _lokr, "vera": _vera, "ia3": _ia3,
    "oft": _oft, "boft": _boft, "fourierft": _fourierft, "ln-tuning": _ln_tuning, "prefix-tuning": _prefix,
    "prompt-tuning": _virtual,
    "p-tuning": _p_tuning,
}  # fmt: skip
"""method → its options; the other names of LoRA share `_lora_kin`."""
