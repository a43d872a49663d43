"""The adapted model during a step: modules by name and layer, each called as transformers and peft call it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from peftplan.depth.sections import checkpointed_layers
from peftplan.memory import fake_quantized, float8, fused_layers, mx_quantized, te_float8, units
from peftplan.memory.model_state import ModelState
from peftplan.memory.parts import Part
from peftplan.methods.adaptation import PROMPTED
from peftplan.tape import norms, ops, products
from peftplan.tape.hooks import hooked
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Outputs, Parameter, Tensor

if TYPE_CHECKING:
    from peftplan.depth.skipped import Skipped
    from peftplan.tape.grouped import Grouped


class Model(ModelState):
    """The modules of a run on one tape. `adapters` wraps the calls of modules that carry adapter tensors."""

    def linear(self, name: str, x: Tensor, layer: int | None = None) -> Tensor:
        """Call a linear layer, through its adapter if it has one."""
        part = self.part(name, layer)
        if self.adapter is not None and _is_adapted(part):
            read = part.params.get("lora_A.weight")
            return self.tape.call(name, layer, (), x, lambda x: self._adapted(part, x), reads=(read,))
        return self._called(name, part, x)

    def _adapted(self, part: Part, x: Tensor) -> Tensor:
        assert self.adapter is not None
        return self.adapter(self.tape, part, x, lambda x: self._called(f"{part.name}.base_layer", part, x), self.running)

    def _called(self, name: str, part: Part, x: Tensor) -> Tensor:
        return self.tape.call(name, part.layer, (part.weight, part.bias), x, lambda x: self.base(part, x))

    def base(self, part: Part, x: Tensor) -> Tensor:
        """The layer without its adapter: dense, 4-bit or 8-bit."""
        f = self.tape
        f.module = part.name
        if part.name in self.token_adapters:
            rows = self.table(part.name, part)  # a local variable of the layer's forward holds them beside autocast's copy
            return products.linear(f, x, rows)
        fake = self.running.kernels.fake_quant
        if fake is not None and self._is_fake_quantized(part) and fake_quantized.quantizes(part, group=fake.group):
            if fake.in_mx:
                return mx_quantized.linear(f, part, x)
            dtype = None if fake.by_range else "fp32" if self.running.own_modules else part.own_weight.dtype
            return fake_quantized.linear(f, part, x, self.scales, group=fake.group, scales_dtype=dtype)
        if self.running.kernels.linear is not None and float8.computes(part.own_weight.dims, is_head=self._is_head(part)):
            return float8.linear(f, part, x)
        by_engine = self.running.kernels.experts
        if self.running.kernels.dense is not None and by_engine is not None and by_engine.narrow is not None:
            return te_float8.linear(f, part, x, by_engine.narrow)
        if part.kind == "LinearSubclass" and part.quant is None:
            return products.falcon_linear(f, x, part.own_weight, part.bias)
        if part.quant is None:
            return products.linear(f, x, part.own_weight, part.bias, transposed=part.kind == "Conv1D")
        from peftplan.memory.quantized import QUANTIZED

        return QUANTIZED[part.quant.layout](f, part, x, self.running)

    def _is_head(self, part: Part) -> bool:
        return part.name == self.arch.output_embedding

    def _is_fake_quantized(self, part: Part) -> bool:
        """Beside adapters the adapted layers; else all: torchtune's tied head is no `nn.Linear`."""
        if self.adapter is not None:
            return _is_adapted(part)
        return not self.running.own_modules or not any(tied == f"{part.name}.weight" for tied, _ in self.arch.ties)

    @property
    def every_layer(self) -> bool:
        """Whether each layer is run: no two are alike, or what follows reads something of each, as a balancing loss does."""
        read = self.router_logits is not None or self.tape.offloaded is not None or self.running.keeps_keys
        return self.units.every_layer or read

    def leaving_out(self, stack: str, layers: int) -> Skipped | None:
        """The stack, if layers between the first and the last ones are left out though none is a copy of another."""
        skipped = None if self.left_out is None else self.leaves_out(stack, layers)
        if skipped is not None:
            assert self.left_out is not None
            self.left_out.append(skipped)
        return skipped

    def arrive(self, layer: int, x: Tensor) -> Tensor:
        """The hidden states on the layer's GPU."""
        if not self.running.checkpoints_frozen and self.trains(layer):
            x = self.asking_gradient(x, of_layer=True)
        return self.units.arrive(layer, x)

    def trains(self, layer: int) -> bool:
        """Whether something of a layer trains."""
        return any(p.trainable and p.layers is not None and layer in p.layers for p in self.parameters.all)

    @property
    def groups(self) -> Grouped | None:
        """What offloads all that a module saves; None where nothing does."""
        kernel = self.running.kernels.activations
        return cast("Grouped", self.tape.offloaded) if kernel is not None and kernel.by_layer else None

    def grouped(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Call a unit of one tensor that is neither a layer nor an embedding."""
        if (groups := self.groups) is None:
            return call(x)
        groups.enter()
        x = call(x)
        return hooked(self.tape, x, groups.reload, groups.leave())

    def call_layer(self, stack: str, layer: int, call: Callable[..., Outputs], x: Tensor, *others: object) -> Outputs:
        """Call a layer between what its unit does before and after it."""
        try:
            if not self.units.every_layer:
                return call(layer, x, *others)
            unit = units.layer(layer + (self.arch.encoder_layers if stack == "decoder" else 0))
            groups = self.groups
            x = self.units.enter_with(unit, x)
            if groups is not None:
                groups.enter()
            out = call(layer, x, *others)
            hidden, *more = out if isinstance(out, tuple) else (out,)
            if groups is not None:
                hidden = hooked(self.tape, hidden, groups.reload, groups.leave())
            hidden = self.units.leave(unit, hidden)
            return (hidden, *more) if more else hidden
        finally:
            self.layer_locals.clear()

    def call_forward(self, layer: int, call: Callable[..., Outputs], x: Tensor, *others: object) -> Outputs:
        """Call a layer's forward, without what its unit does."""
        try:
            return call(layer, x, *others)
        finally:
            self.layer_locals.clear()

    @property
    def hooks_outside(self) -> bool:
        """Whether a reentrant checkpoint lies between the hooks of a layer."""
        return self.running.reentrant and self.running.checkpoints_forward and self.units.every_layer

    def reached(self, stack: str, layers: int) -> tuple[bool, ...]:
        """Whether checkpointing reaches each layer of a stack; torchtune counts them from 1 (activations.py)."""
        before = self.arch.encoder_layers if stack == "decoder" else 0
        reached = checkpointed_layers(layers, before=before + self.running.own_modules, every=self.running.every_n_layers)
        if self.running.checkpoints_frozen:
            return reached
        return tuple(flag and self.trains(before + layer) for layer, flag in enumerate(reached))

    def checkpoint(self, function: Callable[..., Outputs], *args: object, stays: bool = False) -> Outputs:
        """Call a checkpointed layer. `stays`: its input does not go to the host."""
        hosted = self.running.hosted and not stays
        if self.running.reentrant:
            from peftplan.tape.reentrant import checkpoint

            buffer = self.buffers[0] if self.buffers and hosted else None
            return checkpoint(self.tape, function, *args, hosted=hosted, buffer=buffer)
        if self.running.hosted:
            from peftplan.tape.hosted import fetched, stored

            return self.tape.checkpoint(function, *args, inputs=partial(fetched, self.tape, stored(self.tape, args)))
        return self.tape.checkpoint(function, *args)

    def asking_gradient(self, x: Tensor, *, of_layer: bool = False) -> Tensor:
        """The output of the input layer, made a leaf where checkpointing would find nothing that trains before it. `of_layer`:
        the input of a layer, which some trainers make one instead."""
        if x.node is None and self._asks_gradients and of_layer is not self.running.checkpoints_frozen:
            x.node = Node((0, 0), self.tape.module, _leaf_backward, (), checkpointed=False)
            x.node.context = x.detach()
            x.node.saved = (x.detach(),)  # a leaf's `AccumulateGrad` holds the leaf
            if x.storage is not None:
                self.tape.leaves.add((x.storage.number, x.dims))
        return x

    def angles_made(self) -> None:
        """Called where positions have become angles: cuBLAS's workspace is taken there if a product made them."""
        if self.running.rotary_by_product:
            self.tape.products.append((len(self.tape.log), "cuBLAS"))

    @property
    def _asks_gradients(self) -> bool:
        """Under checkpointing transformers hooks the input layers of models that read `input_ids`, peft those of all that
        bitsandbytes did not quantize (transformers `_activation_checkpointing_enable`, peft
        `_prepare_model_for_gradient_checkpointing`)."""
        if self.running.hooks_adapted and self.running.peft_type is not None:
            return True
        if not self.running.hooks_inputs:
            return False
        hooked_by_peft = self.running.peft_type is not None and self.quant is None
        return self.running.checkpointing and ("input_ids" in self.batch or hooked_by_peft)

    def embedding(self, name: str, dims: Dims, ids: Tensor | None = None, *, scaled: bool = False) -> Tensor:
        """Look up an embedding; `ids` are kept where they are not the batch's own. `scaled`: its module scales its rows (BART),
        as one with a buffer for it does (Gemma)."""
        scaled = scaled or any(buffer.name == f"{name}.embed_scale" for buffer in self.arch.buffers)
        self.tape.module = name
        if self.running.peft_type in PROMPTED:
            original = self._original(name)

            def looked_up(ids: Tensor | None) -> Tensor:
                self.tape.module = name  # which a gather in front changes
                return self._rows(original, dims, ids, scaled)

            return self.tape.call(name, None, (original,), ids, looked_up)
        part = self.part(name)
        if "lora_embedding_A" in part.params:
            from peftplan.memory.methods.embeddings import check_lora_embedding, lora_embedding

            check_lora_embedding(self.running)
            rows = self.asking_gradient(self._rows(part.own_weight, dims, ids, scaled))  # its hook is on the base layer
            return lora_embedding(self.tape, part, rows, ids, scaled=scaled)
        return self.tape.call(name, None, (part.weight,), ids, lambda ids: self._rows(self.table(name, part), dims, ids, scaled))

    def _rows(self, table: Operand, dims: Dims, ids: Tensor | None, scaled: bool) -> Tensor:
        """Rows of a table, which lives until they are scaled (peft, tuners/trainable_tokens/layer.py, `forward_adapters`)."""
        rows = ops.embedding(self.tape, table, dims, ids)
        return ops.scale(self.tape, rows) if scaled else rows

    def _original(self, name: str) -> Parameter:
        """The table that prompts read, beside a trained copy that no forward then calls (peft, peft_model.py,
        `_setup_prompt_encoder`)."""
        return self.parameter(next(p for p, part in self._families[name] if part == "weight"), None)

    def table(self, name: str, part: Part) -> Operand:
        """The table of an embedding; the output of `index_copy` where some rows of it train."""
        adapter = self.token_adapters.get(name)
        if adapter is None:
            return part.own_weight
        from peftplan.memory.methods.embeddings import merged_rows

        return merged_rows(self.tape, part, self.part(adapter))

    def rmsnorm(self, name: str, x: Tensor, layer: int | None = None, **how: bool) -> Tensor:
        """Call an RMSNorm."""
        weight, kernel = self.part(name, layer).weight, self.running.kernels.rms_norm

        def norm(x: Tensor) -> Tensor:
            self.tape.module = name
            if kernel is not None and weight is not None:
                shared = self.running.holds_hidden_states and layer is None  # handed out (llama.py:1942)
                return fused_layers.rms_norm(self.tape, kernel._replace(reuses_gradient=False) if shared else kernel, x, weight)
            return norms.rmsnorm(self.tape, x, weight, **how)

        return self.tape.call(name, layer, (weight,), x, norm)

    def layernorm(self, name: str, x: Operand, layer: int | None = None) -> Tensor:
        """Call a LayerNorm."""
        part = self.part(name, layer)

        def norm(x: Operand) -> Tensor:
            self.tape.module = name
            return norms.layernorm(self.tape, x, part.weight, part.bias)

        return self.tape.call(name, layer, (part.weight, part.bias), x, norm)


def _is_adapted(part: Part) -> bool:
    return len(part.params) > 1 and any(key not in ("weight", "bias") for key in part.params)


def _leaf_backward(f: Tape, node: Node, saved: object, g: Tensor) -> tuple[()]:
    """`requires_grad_` makes it a leaf, which keeps its `.grad`: of a slice of several sequences a copy (`accumulate_grad.h`)."""
    whole = g.dims if g.storage is None else f.dims[g.storage.number]
    sliced = len(whole) == len(g.dims) and whole != g.dims and f.several
    kept = f.new(g.dims, g.dtype, "clone") if sliced else g
    if kept.storage is not None and f.keeps_graph:
        f.category[kept.storage.number] = "activations"  # lives beyond the step, as the leaf does
    node.context = (node.context, kept)
    return ()
