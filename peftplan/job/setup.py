"""The setup of a training run: what the user sets, and what its trainer fills in."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from peftplan.dtypes import MODEL_DTYPES, parse_dtype
from peftplan.errors import InputError, UnknownNameError
from peftplan.job.kernels import kernels_of, named_kernels
from peftplan.job.trainer import NARROWED, Forward, Trainer
from peftplan.job.trainer_words import Autocast, DeviceMap, Loss, TrainerName
from peftplan.job.trainers import DEFAULT, TRAINERS, of_release
from peftplan.validation import first_error, listed, no_switches, size_in_bytes

Engine = Literal["analytic", "trace"]
ENGINES: tuple[Engine, ...] = ("analytic", "trace")
AdviceSearch = Literal["best", "all"]
SEARCHES: tuple[AdviceSearch, ...] = ("best", "all")


def _dtype(field: str) -> BeforeValidator:
    return BeforeValidator(lambda v: v if v is None else parse_dtype(v, field=field, accepted=MODEL_DTYPES))


def _size(field: str) -> BeforeValidator:
    return BeforeValidator(lambda v: v if v is None else size_in_bytes(v, field=field))


ModelDtype = Annotated[str, _dtype("dtype")]
Names = Annotated[tuple[str, ...], BeforeValidator(listed)]
KernelNames = Annotated[tuple[str, ...] | None, BeforeValidator(lambda v: named_kernels(v) or None)]
MOST = 2**31
"""The largest batch size, sequence length and other size that is accepted."""
Count = Annotated[int, Field(ge=1, le=MOST)]
Kept = Annotated[Count | None, BeforeValidator(lambda v: None if isinstance(v, int) and v <= 0 else v)]
"""Checkpoints that are kept: all of them below 1, as in transformers (trainer_utils.py, `rotate_checkpoints`)."""
Attention = Literal["sdpa", "eager", "flash_attention_2"]
ATTENTION: tuple[str, ...] = get_args(Attention)


def _release(text: str | None) -> str | None:
    if text is not None and not re.match(r"\d+\.\d+", text):
        raise InputError("tool_version", text, "accepted: a release, such as 0.19")
    return text


class Setup(BaseModel):
    """Everything besides model and method that decides what a run needs; None means: as the trainer does it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    trainer: TrainerName = DEFAULT
    tool_version: Annotated[str | None, AfterValidator(_release)] = None  # the release of the tool whose trainer it is
    task_type: str | None = None
    num_labels: Count | None = None
    quant: str | None = None
    double_quant: bool | None = None
    save_total_limit: Kept = None
    host_memory: Annotated[int | None, _size("host_memory")] = None
    """Bytes of a node."""
    quant_bits: int | None = None
    quant_group_size: int | None = None
    quant_blocksize: int | None = None
    quant_skip_modules: Names | None = None
    quant_experts: bool | None = None
    quant_storage: str | None = None
    compute_dtype: Annotated[str | None, _dtype("compute_dtype")] = None
    dtype: ModelDtype = "bf16"
    device_map: DeviceMap | None = None
    adapter_dtype: Annotated[str | None, _dtype("adapter_dtype")] = None
    autocast: Autocast | None = None
    optim: str | None = None
    optim_args: str | None = None
    optim_target_modules: Names | None = None
    optimizer_in_backward: bool | None = None
    batch_size: Count = 1
    eval_batch_size: Count | None = None
    seq_len: Count = 2048
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool | None = None
    use_reentrant: bool = False
    every_n_layers: Count | None = None
    offload_checkpoints: bool | None = None
    noisy_embeddings: bool | None = None
    expandable_segments: bool | None = None
    attn_implementation: Attention | None = None
    kernels: KernelNames = None
    loss: Loss = "auto"
    logits_to_keep: Count | None = None
    router_loss: bool | None = None
    padding: bool = False
    keep_outputs: bool | None = None
    keep_gradients: bool = False
    clip_gradients: bool | None = None
    kbit_prepare: bool | None = None
    narrow_tables: bool | None = None  # embedding and head, as SFTTrainer did before it made the loss in chunks
    use_cache: bool | None = None
    trust_remote_code: bool = False
    max_completion_length: Count | None = None
    teacher_model: str | None = None
    reward_model: str | None = None
    precompute_ref_log_probs: bool | None = None
    beta: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    loss_type: str | None = None
    max_prompt_length: Count | None = None
    num_generations: Annotated[int | None, Field(ge=2, le=MOST)] = None
    steps_per_generation: Count | None = None
    n_passages: Count | None = None
    tool_turns: bool | None = None
    rollout_batch_size: Count | None = None
    mtp_depths: Annotated[int | None, Field(ge=0, le=MOST)] = None
    use_vllm: bool | None = None
    vllm_mode: Literal["colocate", "server"] | None = None
    vllm_gpu_memory_utilization: Annotated[float | None, Field(gt=0, le=1)] = None
    vllm_enable_sleep_mode: bool | None = None
    move_model_batches: Count | None = None  # groups of layers in which weights reach vLLM

    @property
    def by(self) -> Trainer:
        """What the trainer does."""
        by = of_release(TRAINERS[self.trainer], self.tool_version)
        by = by if self.clip_gradients is None else by._replace(clips_gradients=self.clip_gradients)
        return by._replace(narrows=NARROWED) if self.narrow_tables else by

    @property
    def adapter_on_device(self) -> bool:
        """Whether a dense base is on the card before its adapter is made."""
        return self.by.loads_on_device or self.device_map not in ("none", "cpu")

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """The forwards of a step: those of the trainer that the options leave."""
        weight = self.by.beta if self.beta is None else self.beta
        unused = self.loss_type in self.by.without_reference or (self.by.generates and not weight and not self.by.teaches)
        without = "reference" if self.precompute_ref_log_probs or unused else None
        extra_rows = self.loss_type not in self.by.without_extra_rows
        return tuple(f for f in self.by.forwards if f.of != without and (extra_rows or not f.batch))

    @property
    def prompt_len(self) -> int:
        """Tokens of a prompt before the completion that the policy writes."""
        return max(self.seq_len - (self.max_completion_length or self.seq_len - 1), 1)

    @property
    def vllm_share(self) -> float:
        """The part of a card that vLLM takes, which generates on the training GPUs; 0 where it does not."""
        colocated = bool(self.use_vllm) and self.vllm_mode != "server"
        return (self.vllm_gpu_memory_utilization or VLLM_SHARE) if colocated else 0.0

    @property
    def merges_for_vllm(self) -> bool:
        """Whether an adapter is merged, and taken out again, before vLLM writes completions."""
        return self.by.sends_at_once and bool(self.use_vllm)

    @property
    def by_unsloth(self) -> bool:
        """Whether Unsloth loads the model: a job with its loss, with its layers, or with experts apart."""
        kernels = kernels_of(self.kernels or ())
        return self.loss == "unsloth" or kernels.decoder is not None or kernels.separate is not None

    @property
    def packs_completions(self) -> bool:
        """Whether Unsloth trains on its completions as one row (unsloth_zoo 2026.10.9, `grpo_accumulated_loss`)."""
        return self.by.generates and self.loss == "unsloth"

    @property
    def of_hidden_pairs(self) -> bool:
        """Whether Unsloth makes the log-probabilities of pairs of their hidden states."""
        return self.loss == "unsloth" and (self.by.scoring is not None or self.by.sums_rows)

    @property
    def scored_rows(self) -> int:
        """Completions of a generation, where Unsloth scores them before the step; 0 where it does not."""
        return self.generation_rows if self.packs_completions and len(self.forwards) > 1 else 0

    @property
    def generation_rows(self) -> int:
        """Completions that the policy writes at once."""
        if self.by.rows > 1 or (self.by.rewards and not self.by.values):
            return self.rows
        return self.batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)

    @property
    def segments_grow(self) -> bool:
        """Whether segments are expandable: unless it is said, whether the trainer's package sets them; torchtune's releases up
        to 0.6.1, whose loss of chunks this is, do not."""
        if self.expandable_segments is not None:
            return self.expandable_segments
        return self.by.expandable_segments and self.loss != "torchtune-chunked"

    @property
    def keeps_ends_wide(self) -> bool:
        """Whether norms, embedding and head of a model that trains in full stay in fp32; cut cross entropy needs 16 bits."""
        return self.by.wide_ends and self.attn_implementation != "flash_attention_2" and self.loss != "cut-cross-entropy"

    @property
    def rows(self) -> int:
        """Sequences of a forward: two for each example where it is a pair."""
        return self.batch_size * self.rows_of_example

    @property
    def rows_of_example(self) -> int:
        """Sequences of a forward for each example."""
        return self.by.rows * (self.n_passages or 1 if self.by.passages == "with query" else 1)


VLLM_SHARE = 0.3
"""trl's default of `vllm_gpu_memory_utilization` (grpo_config.py)."""
OF_PREFERENCES = frozenset().union(*(trainer.options for trainer in TRAINERS.values()))
"""Options that only trainers of preferences and RL have."""


def parse_setup(options: Mapping[str, object]) -> Setup:
    """Check the options of a run. Raises InputError or UnknownNameError: one line with field, value and what is accepted."""
    unknown = next((name for name in options if name not in Setup.model_fields), None)
    if unknown is not None:
        raise UnknownNameError("option", unknown, Setup.model_fields)
    no_switches(Setup, options)
    try:
        return Setup.model_validate(dict(options))
    except ValidationError as error:
        raise first_error(error) from None
