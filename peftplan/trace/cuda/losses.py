"""Losses that never hold all logits: the forwards that libraries put in place of a model's own, on kernels without values.

Each takes what the real code takes on CUDA, in the same order; a Triton kernel takes nothing. Letters: n scored tokens, h hidden
size, v vocabulary. Every label counts as scored: how many a run masks (prompts, padding) lies in its data, and fewer take less.

| loss | source |
| --- | --- |
| trl-chunked | trl `kernels/chunked_logprob.py` (`ChunkedLogProbFunction`), `trainer/utils.py` (`add_fused_lm_head`) |
| liger | liger-kernel `ops/fused_linear_cross_entropy.py`, `transformers/model/llama.py` (`lce_forward`) |
| cut-cross-entropy | axolotl's fork of cut-cross-entropy at 5f0c7a7, `cce.py`; in `cut.py` beside this file |
| unsloth | unsloth_zoo 2026.10.9 `fused_losses/fused_linear.py` (`_ce_impl`); in `unsloth.py` beside this file |

Left out: Liger's and Unsloth's other kernels (norms, rotary embeddings, MLP), which change what layers keep; scalars on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from peftplan.errors import InputError, RefusedError
from peftplan.job.loss_sizes import CUT, check_halves, check_liger
from peftplan.trace.cuda.attention import Capability
from peftplan.trace.cuda.cut import CutCrossEntropy
from peftplan.trace.cuda.scored import Rows, Scattered, scored_tokens
from peftplan.trace.cuda.unsloth import FusedLinear, unsloth_tiles
from peftplan.units import ceil_div
from peftplan.versions import named

F = torch.nn.functional
IGNORED = -100
"""The label of positions without a loss."""

TOKEN_TILE = 4096
VOCAB_TILE = 32768
"""TRL projects tiles of so many tokens times so many vocabulary entries; its buffer has that width whatever the vocabulary."""

TENSOR_CORES_OF_BF16 = (8, 0)


def install(model: Any, *, loss: str, prompt: int, capability: Capability) -> None:
    """Put a loss's forward in place of a causal language model's own, as the libraries do. `prompt`: `prompt_tokens`."""
    if loss == "full":
        return
    head = model.get_output_embeddings()
    if head is None:
        raise RefusedError(f"loss: {loss} needs a language model with an output projection; accepted: full")
    if loss == "liger":
        check_liger(model.config.model_type)
    if loss != "liger" and hasattr(head, "base_layer"):
        raise RefusedError(f"target_modules: {loss} reads lm_head.weight itself, so that an adapter on it would not train")
    model.forward = FORWARDS[loss](model, prompt, capability)


SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def install_older(model: Any, *, shifts: bool, in_fp32: bool) -> None:
    """A causal language model's own loss as older transformers had it (`job.script`: `shifts_logits`, `logits_in_fp32`)."""
    head = model.get_output_embeddings() if type(model).__name__.endswith("ForCausalLM") else None
    scaled = any(getattr(model.config.get_text_config(), name, None) for name in SCALED_LOGITS)  # in 16 bits, and cast after it
    if head is not None and in_fp32 and not scaled:
        head.register_forward_hook(lambda module, inputs, logits: logits.float())
    if head is not None and shifts:
        model.loss_function = _of_shifted_logits


def _of_shifted_logits(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """`ForCausalLMLoss` before `versions.LABELS_PADDED`."""
    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    return F.cross_entropy(shift_logits.view(-1, vocab_size), shift_labels.view(-1), ignore_index=IGNORED)


ALL_SCORED = "every label counts"
FACTS: dict[str, dict[str, str]] = {
    "full": {},
    "trl-chunked": {"loss_source": f"{named('trl')} add_fused_lm_head", "scored_tokens": ALL_SCORED},
    "liger": {"loss_source": f"{named('liger-kernel')} fused linear cross entropy, without its layer kernels"},
    CUT: {"loss_source": "axolotl's fork of cut-cross-entropy at 5f0c7a7", "scored_tokens": ALL_SCORED},
    "unsloth": {
        "loss_source": "unsloth_zoo 2026.10.9 fused linear cross entropy on a card of over 24.5 GiB, without its other kernels",
        "scored_tokens": ALL_SCORED,
    },
}


def facts(loss: str) -> dict[str, str]:
    """What a trace with this loss assumes."""
    return FACTS[loss]


def prompt_tokens(model: Any) -> int:
    """Virtual tokens that peft puts before a row's own, labelled -100; prefix tuning puts them into the cache instead."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type.value == "PREFIX_TUNING":
        return 0
    return int(config.num_virtual_tokens)


def tiles(loss: str, *, tokens: Iterable[int], config: Any) -> frozenset[tuple[int, int]]:
    """Shapes of the buffers that hold logits in parts, for each number of tokens that the loss can be given."""
    if loss == "trl-chunked":
        return frozenset((min(n, TOKEN_TILE), VOCAB_TILE) for n in tokens)
    if loss == "liger":
        h, v = config.get_text_config().hidden_size, config.get_text_config().vocab_size
        chunks = [(n, liger_rows(tokens=n, hidden_size=h, vocab_size=v)) for n in tokens]
        return frozenset((rows, v) for n, chunk in chunks for rows in {chunk, n % chunk} - {0})
    if loss == "unsloth":
        return unsloth_tiles(tokens=tokens, config=config)
    return frozenset()


Forward = Callable[..., dict[str, Any]]


def trl_chunked(model: Any, prompt: int, capability: Capability) -> Forward:
    """`add_fused_lm_head`'s forward with the outputs that SFTTrainer asks for."""

    def forward(*args: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        scored = scored_tokens(labels, prompt)
        labels = labels[:, 1:]
        head = model.get_output_embeddings()
        mask = labels != IGNORED
        per_label = ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
            Rows.apply(hidden, mask, scored),  # type: ignore[no-untyped-call]
            head.weight,
            head.bias,
            Rows.apply(labels, mask, scored),  # type: ignore[no-untyped-call]
        )
        log_probs, entropy, is_top1 = (Scattered.apply(part, mask) for part in per_label)  # type: ignore[no-untyped-call]
        del per_label
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        return {"loss": loss, "log_probs": log_probs, "entropy": entropy, "is_top1": is_top1, "label_mask": mask}

    return forward


def liger(model: Any, prompt: int, capability: Capability) -> Forward:
    """`lce_forward` in training: no logits. It returns a class with a `loss`, to which peft's AdaLoRA adds."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(*args: Any, labels: torch.Tensor, logits_to_keep: int = 0, **kwargs: Any) -> dict[str, Any]:
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, slice(-logits_to_keep, None), :]
        if logits_to_keep and not hidden.is_contiguous():  # `LigerForCausalLMLoss` calls `view`
            raise InputError("logits_to_keep", logits_to_keep, "liger keeps the logits of all tokens, or needs batch_size 1")
        labels = F.pad(labels, (0, 1), value=IGNORED)
        targets = labels[..., 1:].contiguous().view(-1)
        head = model.get_output_embeddings()
        loss = LigerCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), head.weight, targets, capability)  # type: ignore[no-untyped-call]
        return CausalLMOutputWithPast(loss=loss)

    return forward


def unsloth(model: Any, prompt: int, capability: Capability) -> Forward:
    """Unsloth's forward in training: `unsloth_fused_ce_loss`. It returns a class with a `loss`, as Liger's does."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(*args: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        scored = scored_tokens(labels, prompt)
        ignored = torch.full_like(labels[..., :1], IGNORED)
        targets = torch.cat((labels[..., 1:], ignored), dim=-1).reshape(-1)
        head = model.get_output_embeddings()
        loss = FusedLinear.apply(hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, targets, scored, capability)  # type: ignore[no-untyped-call]
        return CausalLMOutputWithPast(loss=loss)

    return forward


WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def cut(model: Any, prompt: int, capability: Capability) -> Forward:
    """`cce_forward` in training, with `num_items_in_batch`: no logits."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(*args: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        head = model.get_output_embeddings()
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
        scored = scored_tokens(labels, prompt)
        hidden = hidden.to(head.weight.dtype) if head.weight.dtype == torch.bfloat16 else hidden
        check_halves(*(WORDS.get(tensor.dtype, "fp32") for tensor in (hidden, head.weight)))
        loss = CutCrossEntropy.apply(hidden.flatten(0, -2), head.weight, head.bias, labels, scored, capped)  # type: ignore[no-untyped-call]
        return CausalLMOutputWithPast(loss=loss / scored)

    return forward


FORWARDS: dict[str, Callable[[Any, int, Capability], Forward]] = {
    "trl-chunked": trl_chunked,
    "liger": liger,
    CUT: cut,
    "unsloth": unsloth,
}


class ChunkedLogProbs(torch.autograd.Function):
    """`ChunkedLogProbFunction` with entropy and `is_top1`: tiles are projected in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        tokens, vocab = hidden.shape[0], weight.shape[0]
        dtype = compute_dtype(hidden)
        # running maximum, sums of exponentials, of their squares and of x times them, of logits, maximum before the target
        running = [hidden.new_empty(tokens, dtype=torch.float32) for _ in range(6)]
        target_logit = hidden.new_empty(tokens, dtype=torch.float32)
        buffer = hidden.new_empty(min(tokens, TOKEN_TILE), VOCAB_TILE, dtype=dtype)
        for first in range(0, tokens, TOKEN_TILE):
            chunk = hidden[first : first + TOKEN_TILE].to(dtype)
            for start in range(0, vocab, VOCAB_TILE):
                tile = buffer[: chunk.shape[0], : min(VOCAB_TILE, vocab - start)]
                torch.mm(chunk, weight[start : start + VOCAB_TILE].to(dtype).t(), out=tile)
                if bias is not None:
                    tile.add_(bias[start : start + VOCAB_TILE].to(dtype))
        log_z = running[0] + torch.log(running[1])
        log_probs = target_logit - log_z
        entropy = log_z - running[2] / running[1]
        is_top1 = (target_logit >= running[0]) & (target_logit > running[5])
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, *_ = ctx.saved_tensors
        tokens, vocab, dtype = hidden.shape[0], weight.shape[0], ctx.dtype
        into_hidden, into_weight, into_bias = ctx.needs_input_grad[:3]
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if into_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if into_weight else None
        grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32) if into_bias else None
        buffer = hidden.new_empty(min(tokens, TOKEN_TILE), VOCAB_TILE, dtype=dtype)
        for first in range(0, tokens, TOKEN_TILE):
            chunk = hidden[first : first + TOKEN_TILE].to(dtype)
            for start in range(0, vocab, VOCAB_TILE):
                part = weight[start : start + VOCAB_TILE].to(dtype)
                tile = buffer[: chunk.shape[0], : part.shape[0]]
                torch.mm(chunk, part.t(), out=tile)
                if bias is not None:
                    tile.add_(bias[start : start + VOCAB_TILE].to(dtype))
                if grad_hidden is not None:
                    accumulate(grad_hidden[first : first + TOKEN_TILE], tile, part)
                if grad_weight is not None:
                    accumulate(grad_weight[start : start + VOCAB_TILE], tile.t(), chunk)
                if grad_bias is not None:
                    grad_bias[start : start + VOCAB_TILE] += tile.sum(dim=0, dtype=torch.float32)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


class LigerCrossEntropy(torch.autograd.Function):
    """`LigerFusedLinearCrossEntropyFunction`: the gradients are made in forward, chunk by chunk, and kept for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, capability: Capability) -> Any:
        tokens, width = hidden.shape
        rows = liger_rows(tokens=tokens, hidden_size=width, vocab_size=weight.shape[0])
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if hidden.requires_grad and weight.requires_grad else None
        losses = hidden.new_zeros(tokens, dtype=torch.float32)
        mask = targets != IGNORED
        in_place = hidden.dtype == weight.dtype == compute_dtype(hidden)
        buffer = hidden.new_empty(rows, weight.shape[0]) if in_place else None
        for first in range(0, tokens, rows):
            chunk = hidden[first : first + rows]
            if buffer is None:
                logits = chunk @ weight.t()
            else:
                logits = buffer[: chunk.shape[0]]
                torch.mm(chunk, weight.t(), out=logits)
            if hidden.requires_grad and in_place:
                torch.mm(logits, weight, out=grad_hidden[first : first + rows])
            elif hidden.requires_grad:
                grad_hidden[first : first + rows] = logits @ weight
            if grad_weight is not None:
                _add_to_weight(grad_weight, logits, chunk, capability)
            del logits, chunk
        del buffer, mask
        loss = torch.sum(losses)
        ctx.save_for_backward(grad_hidden.detach(), None if grad_weight is None else grad_weight.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None, None


def _add_to_weight(grad_weight: torch.Tensor, logits: torch.Tensor, chunk: torch.Tensor, capability: Capability) -> None:
    """Straight into the gradient on sm80 and later; before, or with other dtypes, through a product and an fp32 copy of it."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    if capability >= TENSOR_CORES_OF_BF16 and half and grad_weight.dtype == torch.float32:
        torch.addmm(grad_weight, logits.t(), chunk.to(logits.dtype), out_dtype=torch.float32, out=grad_weight)
    elif capability >= TENSOR_CORES_OF_BF16 and half and grad_weight.dtype == logits.dtype:
        torch.addmm(grad_weight, logits.t(), chunk.to(logits.dtype), out=grad_weight)
    else:
        grad_weight += torch.mm(logits.t(), chunk).float()


def liger_rows(*, tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens per chunk: as many logits as the input has elements, rounded up to a power of two of tokens."""
    chunk = ceil_div(tokens, ceil_div(vocab_size, hidden_size))
    return int(min(1 << (chunk - 1).bit_length(), tokens))


def accumulate(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`into += a @ b` for fp32 `into`: cuBLAS writes fp32 from 16-bit factors; other factors are cast first."""
    if a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    else:
        into.addmm_(a.float(), b.float())


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, else the input's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
