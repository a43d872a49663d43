"""The batch of a model's forward in training, derived from its class, its config and the arguments of its forward.

Text is `batch_size × seq_len`. Other inputs (images, audio, a decoder's tokens) follow from the model's config and common
practice, and are stated in `Inputs.facts`. Values are zeros, since only shapes and dtypes matter to a trace.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftplan.errors import InputError, MissingError, RefusedError
from peftplan.job.setup import Setup
from peftplan.trace.pictures import picture_inputs

SAMPLING_RATE = 16_000
MAX_SECONDS = 20
"""Longest clip of `run_speech_recognition_ctc.py` (`max_duration_in_seconds`) and `run_audio_classification.py`
(`max_length_seconds`), transformers' examples; speech encoders read 16 kHz."""
FRAMES_PER_POSITION = 2
"""Whisper's second convolution has stride 2: mel frames per encoder position."""

PER_SAMPLE = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "ForVideoClassification")
PER_TOKEN = ("ForTokenClassification", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "MTModel", "ForConditionalGeneration")
ACCEPTED = (*PER_SAMPLE, *PER_TOKEN, "ForQuestionAnswering", "ForCTC")


@dataclass
class Inputs:
    """One micro batch. `tokens`: the possible numbers of rows per sample of a tensor over the vocabulary, without virtual tokens.

    `selected`: how many entries of a mask of samples × positions are true, for models that ask.
    """

    batch: dict[str, Any]
    tokens: frozenset[int]
    facts: dict[str, int | str] = field(default_factory=dict)
    selected: int | None = None


def inputs(model: Any, setup: Setup) -> Inputs:
    """The batch for a model of transformers, before peft wraps it. Raises InputError for a length that the model's position
    table does not hold, and for `logits_to_keep` where the forward does not take it; RefusedError for a class without a loss."""
    batch = _of_class(model, setup)
    if setup.logits_to_keep is not None and "logits_to_keep" not in batch.batch:
        raise InputError("logits_to_keep", setup.logits_to_keep, f"the forward of {type(model).__name__} has no such argument")
    return batch


def _of_class(model: Any, setup: Setup) -> Inputs:
    takes = frozenset(inspect.signature(model.forward).parameters)
    config = model.config
    if "input_features" in takes and config.is_encoder_decoder:
        return _transcription(model, setup)
    if "input_values" in takes:
        return _sound(model, setup)
    if "input_ids" not in takes:
        return _pictures(model, takes, setup)
    if config.is_encoder_decoder:
        return _seq2seq(model, setup)
    return _text(model, takes, setup)


def _text(model: Any, takes: frozenset[str], setup: Setup) -> Inputs:
    b, s = setup.batch_size, setup.seq_len
    check_length(model, "seq_len", s)
    batch: dict[str, Any] = {"input_ids": ids(b, s)}
    if setup.padding:
        batch["attention_mask"] = ids(b, s, value=1)
    give_pad_token(model)
    pictures = picture_inputs(model, takes, setup)
    scored = setup.logits_to_keep or s
    batch |= pictures.batch | labels(model, takes, b, scored)
    if setup.logits_to_keep is not None and "logits_to_keep" in takes:
        batch["logits_to_keep"] = scored
    if hasattr(model.config, "use_cache"):
        if "use_cache" in takes:
            batch["use_cache"] = bool(setup.use_cache)
        else:  # as `Trainer.__init__` does, for a forward that leaves it to the config
            model.config.use_cache = bool(setup.use_cache)
    elif setup.use_cache is False:  # which Trainer writes into a config that has none, and some models read there
        model.config.use_cache = False
    # DeBERTa's classifier picks the samples that have a label: all of them
    labelled = b if type(model).__name__.endswith("ForSequenceClassification") else None
    return Inputs(batch, frozenset({scored, scored - 1} - {0}), pictures.facts, selected=labelled)


def _seq2seq(model: Any, setup: Setup) -> Inputs:
    """Encoder and decoder sequences of `seq_len`. A decoder with a shorter table of positions gets as many as it has rows."""
    b, s = setup.batch_size, setup.seq_len
    check_length(model, "seq_len", s, side="encoder")
    longest = max_positions(model, side="decoder")
    d = s if longest is None else min(s, longest)
    batch: dict[str, Any] = {"input_ids": ids(b, s)}
    if setup.padding:
        batch["attention_mask"] = ids(b, s, value=1)
    name = type(model).__name__
    of_decoder = name.endswith(("MTModel", "ForConditionalGeneration"))
    if of_decoder:
        check_decoder_start(model)
    batch |= labels(model, frozenset(inspect.signature(model.forward).parameters), b, d if of_decoder else s)
    facts: dict[str, int | str] = {"decoder_seq_len": d} if of_decoder else {}
    # a classifier reads the state of each sample's last token: one end of text per sample
    return Inputs({**batch, "use_cache": bool(setup.use_cache)}, frozenset({d, d - 1}), facts, selected=b)


def _transcription(model: Any, setup: Setup) -> Inputs:
    """Batches of models such as Whisper: clips are padded to the encoder's whole window, and labels are `seq_len` tokens."""
    b, s = setup.batch_size, setup.seq_len
    check_length(model, "seq_len", s, side="decoder")
    check_decoder_start(model)
    frames = FRAMES_PER_POSITION * model.config.max_source_positions
    sound = torch.zeros((b, model.config.num_mel_bins, frames), dtype=_dtype(model, setup))
    batch = {"input_features": sound, "labels": ids(b, s), "use_cache": bool(setup.use_cache)}
    return Inputs(batch, frozenset({s, s - 1}), {"mel_frames": frames, "decoder_seq_len": s})


def _sound(model: Any, setup: Setup) -> Inputs:
    """Raw samples of the longest clip that the examples keep, or the spectrogram of the size that the config states."""
    b, config = setup.batch_size, model.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        sound = torch.zeros((b, config.max_length, config.num_mel_bins), dtype=_dtype(model, setup))
        batch = {"input_values": sound, **labels(model, frozenset({"labels"}), b, 1)}
        return Inputs(batch, frozenset(), {"mel_frames": config.max_length})
    samples = MAX_SECONDS * SAMPLING_RATE
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
    tokens = min(setup.seq_len, frames)
    batch = {"input_values": torch.zeros((b, samples), dtype=_dtype(model, setup))}
    batch |= labels(model, frozenset(inspect.signature(model.forward).parameters), b, tokens)
    facts: dict[str, int | str] = {"audio_seconds": MAX_SECONDS, "sampling_rate": SAMPLING_RATE}
    masked = _masked_frames(config, frames)
    facts |= {"masked_frames": masked} if masked else {}
    facts |= {"label_tokens": tokens} if type(model).__name__.endswith("ForCTC") else {}
    return Inputs(batch, frozenset({frames}), facts, selected=b * masked)


def _masked_frames(config: Any, frames: int) -> int:
    """Frames per sample that SpecAugment masks in training, at most: its spans may overlap (`_compute_mask_indices`, 5.24)."""
    if not getattr(config, "apply_spec_augment", False) or not config.mask_time_prob:
        return 0
    spans = max(int(config.mask_time_prob * frames / config.mask_time_length), config.mask_time_min_masks)
    return int(spans * config.mask_time_length)


def _pictures(model: Any, takes: frozenset[str], setup: Setup) -> Inputs:
    """One image or clip per sample, of the size that the config states."""
    pictures = picture_inputs(model, takes, setup)
    if not pictures.batch:
        raise RefusedError(
            f"engine: trace cannot make an input for {type(model).__name__}; accepted: models of text, images or audio"
        )
    return Inputs({**pictures.batch, **labels(model, takes, setup.batch_size, 1)}, frozenset(), pictures.facts)


def labels(model: Any, takes: frozenset[str], b: int, s: int) -> dict[str, Any]:
    """The labels of the class's loss. Their shape follows from the end of the class's name."""
    name = type(model).__name__
    if "start_positions" in takes and name.endswith("ForQuestionAnswering"):
        return {"start_positions": ids(b), "end_positions": ids(b)}
    if "return_loss" in takes:
        return {"return_loss": True}
    if "labels" in takes and name.endswith(PER_SAMPLE):
        return {"labels": _classes(model.config, b)}
    if "labels" in takes and name.endswith((*PER_TOKEN, "ForCTC")):
        return {"labels": ids(b, s)}
    known = ", ".join(f"…{end}" for end in ACCEPTED)
    raise RefusedError(f"engine: {name} has no loss to train on; accepted with task_type: {known}")


def _classes(config: Any, b: int) -> torch.Tensor:
    """One label per sample; floats where the config states regression, one per class where it states several labels."""
    if config.problem_type == "multi_label_classification":
        return torch.zeros((b, config.num_labels))
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return torch.zeros((b,) if config.num_labels == 1 else (b, config.num_labels))
    return ids(b)


def ids(*shape: int, value: int = 0) -> torch.Tensor:
    """A tensor of token ids, or of ones as a mask."""
    return torch.full(shape, value, dtype=torch.int64)


def _dtype(model: Any, setup: Setup) -> torch.dtype:
    """Of pictures and sound: the processor gives fp32, which only autocast takes beside weights of 16 bits."""
    return torch.float32 if setup.autocast != "none" else model.dtype


def give_pad_token(model: Any) -> None:
    """Set a pad token if the config has none, as users must: a classifier that scores the last token of each sequence needs one
    for batches above 1 (transformers, modeling_layers.py, `GenericForSequenceClassification.forward`)."""
    config = model.config.get_text_config()
    if type(model).__name__.endswith("ForSequenceClassification") and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0


def check_decoder_start(model: Any) -> None:
    """Raise InputError if the config has no start token. Labels are shifted to become decoder inputs (`shift_tokens_right`)."""
    config = model.config.get_text_config(decoder=True)
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(config, name, None) is None and getattr(model.config, name, None) is None:
            raise MissingError(f"model: {name}", f"{type(model).__name__} shifts its labels with this token id")


def check_length(model: Any, name: str, length: int, *, side: str = "") -> None:
    """Raises InputError if there are more tokens than rows in that side's table of positions."""
    longest = max_positions(model, side=side)
    if longest is not None and length > longest:
        raise InputError(name, length, f"accepted: up to {longest}, the positions of {type(model).__name__}")


OTHER_SIDES = ("vision", "visual", "image", "audio", "speech", "qformer")


def max_positions(model: Any, *, side: str = "") -> int | None:
    """Rows of the smallest table of absolute positions that tokens of one side pass through; None without a table.

    `side` is `encoder` or `decoder` of a model with both. Rotary and relative positions have no table and no bound.
    """
    tables = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(other in part for part in parts for other in OTHER_SIDES) or (side and side not in parts):
            continue
        if isinstance(module, nn.Embedding) and _counts_positions(parts[-1]):
            tables.append(_rows(module))
        elif isinstance(table := module._buffers.get("embed_positions"), torch.Tensor):
            tables.append(table.shape[0])
    return min(tables, default=None)


def _counts_positions(leaf: str) -> bool:
    return leaf == "wpe" or ("position" in leaf and "relative" not in leaf and "bias" not in leaf)


def _rows(table: nn.Embedding) -> int:
    """Positions that a table holds: OPT and BART skip `offset` rows, RoBERTa the rows up to the padding's."""
    if hasattr(table, "offset"):
        return table.num_embeddings - int(str(table.offset))
    return table.num_embeddings if table.padding_idx is None else table.num_embeddings - table.padding_idx - 1
