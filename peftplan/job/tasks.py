"""Restrictions that follow from a model's task, with the same reasons for all engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from peftplan.arch.heads import TASK_TYPES
from peftplan.arch.modules import Architecture
from peftplan.arch.readers import READERS
from peftplan.errors import InputError, OptionError, PeftplanError, RefusedError
from peftplan.job import sources
from peftplan.job.loss_sizes import check_liger
from peftplan.job.setup import Setup
from peftplan.job.trainers import TRAINERS
from peftplan.methods.saved import SAVED_HEADS
from peftplan.optim import parse_optim

BARE = "FEATURE_EXTRACTION"
CAUSAL = "CAUSAL_LM"
PICTURES = "IMAGE_CLS"
CALLED = {CAUSAL: "causal language models", "SEQ_CLS": "classes that score a sequence", BARE: "models without a head"}
"""Tasks of trainers, in words."""
OF_TOKENS = ("seq_len", "padding", "use_cache")
"""Options that a vision model ignores, since its tokens are patches."""

OF_VLLM = ("vllm_mode", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "move_model_batches")
"""Options that only `use_vllm` reads."""

WITHOUT_LABELS = (CAUSAL, "SEQ_2_SEQ_LM", "MASKED_LM", BARE)

WITH_PAD_TOKEN = (
    "biogpt", "cohere_compass_text", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "jamba", "ministral3", "mistral4", "olmo", "olmo2", "olmo3", "opt", "phi3", "seed_oss", "smollm3",
    "t5gemma", "zamba", "zamba2",
)  # fmt: skip
"""Model types with a `score` of the last token whose config class has a pad token, stated or not (transformers)."""

ALWAYS_ALL_LOGITS = (
    "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody", "prophetnet", "trocr", "whisper", "xlstm",
)  # fmt: skip
"""Model types whose causal language model's forward has no `logits_to_keep` (transformers)."""


def check_task(model: object, architecture: Architecture, setup: Setup) -> None:
    """Raise RefusedError for a trainer or a loss that only causal language models have, InputError for an option that only
    their forwards take. `setup` is resolved."""
    task, model_class = architecture.task_type, architecture.model_class
    if setup.by.task not in (None, task):
        others = ", ".join(name for name, trainer in TRAINERS.items() if trainer.task in (None, task))
        raise RefusedError(
            f"trainer: {setup.by.called} trains {CALLED[str(setup.by.task)]}, not {model_class}; accepted: {others}"
        )
    if setup.logits_to_keep is not None and (task != CAUSAL or architecture.model_type in ALWAYS_ALL_LOGITS):
        raise InputError("logits_to_keep", setup.logits_to_keep, f"the forward of {model_class} has no such argument")
    if setup.mtp_depths is not None and not setup.by.own_decoders:
        accepted = f"{setup.by.called} predicts one token; accepted: with --trainer automodel"
        raise OptionError("mtp_depths", setup.mtp_depths, accepted)
    if task == CAUSAL:
        if setup.loss == "liger":
            check_liger(architecture.model_type)
        return
    if setup.loss != "full":
        raise RefusedError(
            f"loss: {setup.loss} replaces the loss of causal language models, not of {model_class}; accepted: full"
        )


def as_told(architecture: Architecture, adapter: Mapping[str, object]) -> Architecture:
    """The architecture with the task that peft gets: the adapter config's, which may be none, or without one the model's."""
    if "task_type" not in adapter:
        return architecture
    task = adapter["task_type"]
    return replace(architecture, task_type=str(getattr(task, "value", task) or ""))


def head_notes(architecture: Architecture, adapter: Mapping[str, object]) -> Iterator[str]:
    """A note that peft leaves the task's head frozen, if the adapter config does not name the task."""
    names = SAVED_HEADS.get(architecture.task_type, ())
    if names and as_told(architecture, adapter).task_type not in SAVED_HEADS:
        head = next((m.name for m in architecture.modules if m.name.rpartition(".")[2] in names), None)
        if head is not None:
            yield f"the adapter config states no task_type {architecture.task_type}, so peft does not train the head ({head})"


def task_notes(model: object, architecture: Architecture, setup: Setup) -> Iterator[str]:
    """What is set and not read, what the task's class asks of its user besides, and how TRL 1.16 loads a model
    (`create_model_from_path`)."""
    model_class = architecture.model_class
    unread: dict[str, str] = {}
    if architecture.task_type == PICTURES:
        unread |= dict.fromkeys(("seq_len", "padding"), f"{model_class} reads images of the size in its config")
    if architecture.task_type in WITHOUT_LABELS:
        unread["num_labels"] = f"{model_class} has no classes (--task-type)"
    if not parse_optim(str(setup.optim)).low_rank:
        unread["optim_target_modules"] = f"{setup.optim} projects no modules, GaLore and APOLLO do"
    yield from (f"{name} is not used: {why}" for name, why in unread.items() if name in setup.model_fields_set)
    positions = rotary_positions(model, architecture)
    if positions is not None and setup.seq_len > positions and "seq_len" in setup.model_fields_set:
        yield f"seq_len {setup.seq_len:,} is beyond the config's max_position_embeddings, {positions:,}; all tokens are counted"
    if architecture.task_type == "SEQ_2_SEQ_LM" and "num_mel_bins" not in sources.load_config(model):  # not of speech
        yield f"targets are counted as long as the input: {setup.seq_len:,} tokens"
    if setup.by.loads_in_fp32 and "dtype" not in setup.model_fields_set:
        trainer = setup.by.called.partition(" of ")[0]
        yield f"{trainer} loads a model passed by name in fp32 unless model_init_kwargs sets a dtype (--dtype fp32)"
    if setup.by.embeds:
        yield "each row is a pair of texts of seq_len tokens each, with MultipleNegativesRankingLoss; triplets need more"
    if setup.use_vllm and not setup.vllm_share:
        yield "a vLLM server generates elsewhere: nothing of it is on this card"
    completion = setup.max_completion_length
    if "max_completion_length" in setup.by.options and (completion is None or completion >= setup.seq_len):
        why = "is not set" if completion is None else f"{completion:,} leaves no prompt within seq_len {setup.seq_len:,}"
        yield f"max_completion_length {why}: every token of a sequence except the first is counted as part of the completion"
    of_last_token = architecture.task_type == "SEQ_CLS" and setup.by.passages is None
    scores = of_last_token and any(module.name == "score" for module in architecture.modules)
    if scores and setup.batch_size > 1 and not _has_pad_token(sources.load_config(model)):
        yield (
            f"{model_class} takes more than one sequence only with a pad token, and the model's config has none: "
            "set model.config.pad_token_id (counted as set)"
        )


def without_vllm(setup: Setup) -> Iterator[str]:
    """A warning for options of vLLM where transformers generates."""
    if setup.use_vllm:
        return
    unread = [name for name in OF_VLLM if getattr(setup, name)]
    if unread:
        yield f"{', '.join(unread)}: without effect, since vLLM does not generate; add --use-vllm"


def rotary_positions(model: object, architecture: Architecture) -> int | None:
    """The number of positions in the config of a model without a table of positions; None if it states none."""
    if architecture.max_positions is not None:
        return None
    positions = _of_text(sources.load_config(model)).get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def _has_pad_token(config: Mapping[str, object]) -> bool:
    """Whether the config of a decoder, or its config class, says which token is padding."""
    of_text = _of_text(config)
    in_config = "pad_token_id" in of_text
    return of_text["pad_token_id"] is not None if in_config else config.get("model_type") in WITH_PAD_TOKEN


def _of_text(config: Mapping[str, object]) -> Mapping[str, object]:
    """The config of the language model, which that of a vision-language model holds."""
    inside = config.get("text_config")
    return inside if isinstance(inside, Mapping) and inside else config


def without_loss(model: object, architecture: Architecture, setup: Setup) -> str | None:
    """Why a bare model cannot train, so that it has counts but no peak; None for one that can.

    A bare model that peftplan does not read itself can have its own loss (CLIP): only the trace engine can tell.
    """
    if architecture.task_type != BARE or architecture.model_type not in READERS or setup.by.embeds or setup.by.passages:
        return None
    return f"task_type: {architecture.model_class} has no loss to train on; accepted: {', '.join(_with_loss(model))}"


def _with_loss(model: object) -> Iterator[str]:
    """The tasks that transformers has a class for, of this model's type."""
    for task in TASK_TYPES:
        try:
            if task != BARE and sources.load(model, task_type=task):
                yield task
        except PeftplanError:
            continue
