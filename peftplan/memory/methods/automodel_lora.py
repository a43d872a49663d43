"""LoRA as NeMo Automodel runs it: one autograd function, into whose result the base layer's is added in place.

n tokens, r rank. Source: nemo_automodel 0.7.0, components/_peft/lora.py (`LinearLoRA.forward`, `LoRATritonFunction`) and
lora_kernel.py. With `use_triton` its kernels write what is here a product; without it the forward holds two more (n, r) tensors
for a moment. Left out: the 256 MiB that Triton's autotuner writes in the first step before it times a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.parts import Part, Running
from peftplan.methods.lora import LoraConfig
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Parameter, Tensor

OF_TORCH = ".in_proj"
"""A projection that is torch's also where Transformer Engine has the others (components/models/nemotron_v3/layers.py)."""


def lora(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """`lora_B(lora_A(x) * scale) + base(x)`: saves x, A and B. The sum is made apart where a dropout comes before it."""
    dropout = running.config_as(LoraConfig).lora_dropout
    by_engine = running.kernels.dense is not None and not part.name.endswith(OF_TORCH)
    if f.modules is not None or by_engine or running.kernels.adapters is not None:
        return divided(f, part, x, base, dropout=dropout)
    result = base(x)
    a, b = part.params["lora_A.weight"], part.params["lora_B.weight"]
    f.module = part.name
    node = f.record(_backward, (x, a, b, *([] if dropout else [result])))
    out = f.new(result.dims, x.dtype, "lora", node)
    if node is not None:
        node.in_python = True
    f.keep(node, x.detach(), a, b)
    return ops.add_(f, ops.dropout(f, out, dropout), result) if dropout else out


def divided(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], *, dropout: float = 0) -> Tensor:
    """The same of matrices that are divided over ranks, or of Transformer Engine, or where a file asks for it, operation by
    operation (`_should_use_memory_efficient_lora`)."""
    result = base(x)
    a, b = part.params["lora_A.weight"], part.params["lora_B.weight"]
    f.module = f"{part.name}.lora_A"
    low = f.call(f.module, part.layer, (a,), x, lambda x: products.linear(f, x, a))
    f.module = f"{part.name}.lora_B"
    low = ops.scale(f, low)
    out = f.call(f.module, part.layer, (b,), low, lambda x: products.linear(f, x, b))
    del low
    f.module = part.name
    return ops.add(f, result, ops.dropout(f, out, dropout))


def _backward(f: Tape, node: Node, saved: tuple[Tensor, Parameter, Parameter], g: Tensor) -> Gradients:
    """dx and g @ B, then the gradients of A and B, each of a product that is dropped; that of the base is g itself."""
    x, a, b = saved
    rows, rank = x.dims[:-1], a.dims[0]
    low = f.new((*rows, rank), x.dtype, "dy @ B")
    grad_x = f.new(x.dims, x.dtype, "dx") if node.edges[0] else None
    if grad_x is not None and grad_x.storage is not None:
        f.views.add(grad_x.storage.number)  # by tokens, viewed by rows: what is added to it goes into a new tensor
    grad_a = f.new(a.dims, a.dtype, "mm")
    del low
    low = f.new((*rows, rank), x.dtype, "x @ A")
    grad_b = f.new(b.dims, b.dtype, "mm")
    del low
    return grad_x, grad_a, grad_b, *([g] if len(node.edges) > len(saved) else [])
