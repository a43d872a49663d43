"""The setup of a running transformers or TRL training, as options of `peftplan.estimate`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from peftplan.dtypes import MODEL_DTYPES, parse_dtype
from peftplan.libraries.meta import task_of


class Seen(NamedTuple):
    """The shape of a batch: sequences, tokens of the longest, and whether a mask hides any."""

    batch_size: int
    seq_len: int
    padding: bool

    @property
    def tokens(self) -> int:
        """Positions that the model computes."""
        return self.batch_size * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch_size} × {self.seq_len} tokens"


def seen(arguments: dict[str, Any]) -> Seen | None:
    """The shape of the batch that a model's forward is given; None if it is given neither tokens nor their embeddings."""
    tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if not isinstance(tokens, torch.Tensor):
        return None
    mask = arguments.get("attention_mask")
    hides = isinstance(mask, torch.Tensor) and mask.dim() == tokens.dim() and not bool(mask.all())
    return Seen(tokens.shape[0], tokens.shape[1], hides)


def described(model: Any, args: Any) -> dict[str, Any]:
    """The arguments of `peftplan.estimate` for a Trainer's model and TrainingArguments, besides the batch's shape.

    Read from the objects themselves: the model's config, its quantization and peft config, its parameters' dtypes, and whether it
    checkpoints; the rest is `TrainingArguments`' as `job.ecosystem` reads it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    peft_config = model.peft_config[model.active_adapter] if hasattr(model, "peft_config") else None
    trains = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    quantization = getattr(base.config, "quantization_config", None)
    options = {
        "method": "full" if peft_config is None else None,
        "peft_config": peft_config,
        "quantization_config": quantization,
        "training_args": args,
        "task_type": task_of(type(base).__name__, base.config),
        "dtype": _model_dtype(base),
        "adapter_dtype": parse_dtype(trains[0].dtype, accepted=MODEL_DTYPES) if peft_config is not None and trains else None,
        "attn_implementation": base.config._attn_implementation,
        "gradient_checkpointing": bool(base.is_gradient_checkpointing),
        "num_labels": base.config.num_labels if hasattr(base, "num_labels") else None,
    }
    if quantization is not None:
        options["kbit_prepare"] = _kbit_prepared(base)
    return {"model": base.config, **{name: value for name, value in options.items() if value is not None}}


def _model_dtype(base: Any) -> str:
    """The dtype that the base was loaded in, from its config."""
    return parse_dtype(base.config.dtype or next(base.parameters()).dtype, accepted=MODEL_DTYPES)


def _kbit_prepared(base: Any) -> bool:
    """Whether `prepare_model_for_kbit_training` cast the token embedding, which no quantization touches, to fp32."""
    embedding = base.get_input_embeddings().weight
    return bool(embedding.dtype == torch.float32 and base.config.dtype != torch.float32)
