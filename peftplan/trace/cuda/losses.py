"""Losses that never hold all logits: the forwards that libraries put in place of a model's own, on kernels without values.

Each takes what the real code takes on CUDA, in the same order; a Triton kernel takes nothing. Letters: n scored tokens, h hidden
size, v vocabulary. Every label counts as scored: how many a run masks (prompts, padding) lies in its data, and fewer take less.

| loss | source | beside this file |
| --- | --- | --- |
| trl-chunked | trl `kernels/chunked_logprob.py`, `trainer/utils.py` (`add_fused_lm_head`) | `chunked.py` |
| liger | liger-kernel `ops/fused_linear_cross_entropy.py`, `transformers/model/llama.py` (`lce_forward`) | `liger.py` |
| cut-cross-entropy | axolotl's fork of cut-cross-entropy at 5f0c7a7, `cce.py` | `cut.py` |
| unsloth | unsloth_zoo 2026.10.9 `fused_losses/fused_linear.py` (`_ce_impl`) | `unsloth.py` |

Left out: Liger's and Unsloth's other kernels (norms, rotary embeddings, MLP), which change what layers keep; scalars on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from peftplan.errors import InputError, RefusedError
from peftplan.job.loss_sizes import CUT, check_halves, check_liger
from peftplan.job.script import Script
from peftplan.job.setup import Setup
from peftplan.trace.cuda.attention import Capability
from peftplan.trace.cuda.chunked import TOKEN_TILE, VOCAB_TILE, ChunkedLogProbs
from peftplan.trace.cuda.cut import CutCrossEntropy
from peftplan.trace.cuda.liger import IGNORED, LigerCrossEntropy, liger_rows
from peftplan.trace.cuda.scored import Rows, Scattered, scored_tokens
from peftplan.trace.cuda.unsloth import FusedLinear, unsloth_tiles
from peftplan.versions import named

F = torch.nn.functional


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


def ask_for_load_loss(config: Any, setup: Setup) -> None:
    """Have a mixture's config say whether its class makes the load-balancing loss: as the option does, or the trainer."""
    adds = setup.router_loss
    if adds is None and setup.by.balances_experts and not setup.by_unsloth:
        adds = bool(getattr(config, "router_aux_loss_coef", None))
    if adds is not None and hasattr(config, "output_router_logits"):
        config.output_router_logits = adds


SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def install_older(model: Any, script: Script) -> None:
    """A causal language model's own loss as older transformers had it."""
    if script.reads_16_bits(model.config.get_text_config().model_type):
        model.loss_function = _of_shifted_logits
        return
    head = model.get_output_embeddings() if type(model).__name__.endswith("ForCausalLM") else None
    scaled = any(getattr(model.config.get_text_config(), name, None) for name in SCALED_LOGITS)  # in 16 bits, and cast after it
    if head is not None and script.logits_in_fp32 and not scaled:
        head.register_forward_hook(lambda module, inputs, logits: logits.float())
    if head is not None and script.shifts_logits:
        model.loss_function = lambda logits, **others: _of_shifted_logits(logits.float(), **others)


def _of_shifted_logits(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """`ForCausalLMLoss` before `versions.LABELS_PADDED`, of logits that are fp32 already; the classes in `script.OF_16_BITS` had
    their own, which cast nothing."""
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


def whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The parameter, gathered where ranks hold shards of it: of a unit of FSDP2 of which no module runs."""
    from torch.distributed.tensor import DTensor

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def trl_chunked(model: Any, prompt: int, capability: Capability) -> Forward:
    """`add_fused_lm_head`'s forward with the outputs that SFTTrainer asks for."""

    def forward(*args: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        kwargs["use_cache"] = False
        outputs = model.base_model(*args, **kwargs)
        hidden = outputs.last_hidden_state[:, :-1]
        scored = scored_tokens(labels, prompt)
        labels = labels[:, 1:]
        head = model.get_output_embeddings()
        mask = labels != IGNORED
        per_label = ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
            Rows.apply(hidden, mask, scored),  # type: ignore[no-untyped-call]
            whole(head.weight),
            whole(head.bias),
            Rows.apply(labels, mask, scored),  # type: ignore[no-untyped-call]
        )
        log_probs, entropy, is_top1 = (Scattered.apply(part, mask) for part in per_label)  # type: ignore[no-untyped-call]
        del per_label
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        result = {"loss": loss, "log_probs": log_probs, "entropy": entropy, "is_top1": is_top1, "label_mask": mask}
        if getattr(outputs, "router_logits", None):
            result["aux_loss"] = load_loss(model.config.get_text_config(), outputs.router_logits, kwargs.get("attention_mask"))
        return result

    return forward


def load_loss(config: Any, router_logits: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The load-balancing loss of a mixture, by the function that all classes copy."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, mask)
    assert isinstance(loss, torch.Tensor)
    return loss


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
