"""Which steps of other tools' trainers have a formula: those that were rehearsed (tests/rehearse/*.jsonl)."""

from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.loss_sizes import CHORD, MASKED

if TYPE_CHECKING:
    from peftplan.job.job import Job

DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are alike: without windows, caps of logits or experts."""


class Rehearsed(NamedTuple):
    """What of a trainer was rehearsed, with checkpoints and bf16, of a base that is not quantized."""

    method: str
    strategy: str | None = None
    """None: one GPU."""
    model_types: tuple[str, ...] = DENSE
    attention: tuple[str, ...] = ("flash_attention_2",)
    vllm: tuple[str | None, ...] = (None,)
    """Where vLLM writes completions; None: nowhere."""
    one_row: bool = False
    """Whether a batch is one row."""
    from_host: bool = False
    """Whether weights that wait on the host, as states do, are sent in groups (`move_model_batches`)."""
    in_groups: bool = False
    """Whether weights are sent in groups, of a policy that is compared with the model without its adapter."""
    by_file: bool = False
    """Whether it was rehearsed only as its tool's files are read: with weights on the card, and under a release of transformers
    whose checkpoints cover the hooks around a layer (`job.configs.with_file.of_releases`)."""
    states_on: str = "none"
    """Where the optimizer's states are then; none: on the card."""


REHEARSED = {
    "llamafactory-reward": Rehearsed("lora", attention=("sdpa", "flash_attention_2")),
    "axolotl-grpo": Rehearsed("full"),
    "swift-embedding": Rehearsed("lora", "zero2", ("qwen3",), one_row=True),
    "swift-embedding-shared-rows": Rehearsed("full", "ddp", ("qwen3",), one_row=True),
    "swift-generative-reranker-shared-rows": Rehearsed("full", "ddp", ("qwen3",), one_row=True),
    "swift-grpo-shared-rows": Rehearsed("full", "zero3", vllm=("colocate",), one_row=True),
    "swift-grpo-unhosted": Rehearsed(
        "lora", "zero3", attention=("sdpa",), vllm=("colocate",), one_row=True, by_file=True, states_on="cpu"
    ),
    "swift-grpo-grouped": Rehearsed(
        "full", "zero3", ("qwen3_moe",), ("sdpa",), vllm=("colocate", "server"), one_row=True, from_host=True
    ),
    "swift-grpo-taught": Rehearsed("full", "zero2", vllm=("server",)),
}
"""Trainer → what was rehearsed of it."""
RELOADED = "qwen2_5_vl"
"""The model type whose weights were rehearsed to wait on the host under ZeRO-1, fully trained and with LoRA."""
SENT_IN_GROUPS = Rehearsed(
    "lora", "zero3", ("qwen3_moe",), ("sdpa",), vllm=("colocate", "server"), one_row=True, in_groups=True, by_file=True
)
"""What was rehearsed of other trainers that send groups, or under ZeRO-3 compare with the model without its adapter."""
OF_TEXT_PART = Rehearsed("partial", "zero3", (RELOADED,), ("flash_attention_2", "sdpa"), vllm=("server",), one_row=True)
"""What was rehearsed of ms-swift's GRPO under ZeRO-3 that trains a text part alone, without a reference."""
WITH_ANSWERS = Rehearsed("full", "zero3", ("qwen2",), ("sdpa",), vllm=("colocate",))
"""What was rehearsed of completions beside rows whose answers are given."""
TAKING_TURNS = ("plain", "transformers", "trl", "axolotl")
"""Trainers whose layers may take turns, as in axolotl's, which was rehearsed."""


def unlike_rehearsed(job: "Job") -> str | None:
    """What of a job its trainer was not rehearsed with; None where all of it was."""
    shown = _shown_of(job)
    differs = None if shown is None else _differs(job, shown)
    if differs is not None:
        return f"a step of {job.setup.by.called} with {differs}"
    if job.adaptation.rests and not _rests_as_rehearsed(job):
        by_what = f"{job.setup.by.called} with {job.setup.optim}"
        return f"layers that take turns by {by_what} and model type {job.architecture.model_type}"
    strategy, model_type = None if job.distributed is None else job.distributed.strategy, job.architecture.model_type
    if job.setup.by.reloads_weights and strategy == "zero1" and model_type != RELOADED:
        return f"model type {model_type} under ZeRO-1 by {job.setup.by.called}"
    if strategy == "zero3" and job.setup.by.gathers_when_called and shown is None and not _is_dense(job):
        return f"a mixture of experts under ZeRO-3 by {job.setup.by.called}"
    if job.setup.loss == MASKED and not _masks_as_rehearsed(job):
        return "a loss of masked tokens, other than in full fine-tuning in bf16 on one GPU"
    return None


def _shown_of(job: "Job") -> Rehearsed | None:
    """What was rehearsed of a job's trainer; None where other modules say it."""
    setup, strategy = job.setup, None if job.distributed is None else job.distributed.strategy
    if setup.loss_type == CHORD:
        return WITH_ANSWERS
    if setup.by.gathers_when_called and strategy == "zero3" and job.method_name == "partial":
        return OF_TEXT_PART
    alone = setup.by.gathers_when_called and strategy == "zero3" and job.reference == "adapter_off"
    grouped = alone or setup.move_model_batches is not None
    return REHEARSED.get(setup.by.name, SENT_IN_GROUPS if grouped else None)


def _differs(job: "Job", shown: Rehearsed) -> str | None:
    """The first thing of a job that is not as it was rehearsed."""
    setup, distributed, config = job.setup, job.distributed, job.config
    vllm = (setup.vllm_mode or "colocate") if setup.use_vllm else None
    differing = {
        f"method {job.method_name}": job.method_name != shown.method,
        "DoRA or modules_to_save": bool(getattr(config, "use_dora", False) or getattr(config, "modules_to_save", None)),
        "a quantized base": job.quant is not None,
        "one GPU" if distributed is None else distributed.called: (distributed and distributed.strategy) != shown.strategy,
        f"model type {job.architecture.model_type}": job.architecture.model_type not in shown.model_types,
        f"dtype {setup.dtype} and autocast {setup.autocast}": not setup.dtype == setup.autocast == "bf16",
        f"attention {setup.attn_implementation}": setup.attn_implementation not in shown.attention,
        "no checkpoints": not setup.gradient_checkpointing,
        "other offloading or checkpoints than --config reads of its tool's files": shown.by_file
        and not _is_of_file(job, shown.states_on),
        "weights that are not sent in groups from the host": shown.from_host and not _sends_groups(job),
        "weights that are not sent in groups": shown.in_groups and setup.move_model_batches is None,
        "a reference model": shown is OF_TEXT_PART and job.reference != "none",
        "no reference model": shown.in_groups and job.reference != "adapter_off",
        f"{setup.batch_size} rows": shown.one_row and setup.batch_size > 1,
        "ring attention, as its GPUs do not divide the heads of keys": _rings(job),
        "generation by transformers" if vllm is None else f"vLLM ({vllm})": vllm not in shown.vllm,
    }
    return next((what for what, is_so in differing.items() if is_so), None)


def _rings(job: "Job") -> bool:
    """Whether GPUs that share a row of texts exchange keys in a ring: those that heads are too few for (ms-swift 4.6.0,
    sequence_parallel/sequence_parallel.py:653)."""
    ranks = job.distributed.world_size if job.setup.by.shares_texts and job.distributed is not None else 1
    return any(a.num_key_value_heads % ranks for block in job.architecture.blocks for a in block.attentions)


def _is_of_file(job: "Job", states_on: str) -> bool:
    distributed = job.distributed
    placed = distributed is not None and (distributed.offload_optimizer, distributed.offload_params) == (states_on, "none")
    return placed and bool(job.setup.use_reentrant) and not job.script.checkpoints_forward


def _sends_groups(job: "Job") -> bool:
    """Whether groups of weights are sent that wait on the host, of a policy and its copy, with reentrant checkpoints."""
    distributed, setup = job.distributed, job.setup
    on_host = distributed is not None and distributed.offload_optimizer == distributed.offload_params == "cpu"
    return on_host and setup.move_model_batches is not None and bool(setup.use_reentrant) and job.reference == "copy"


def _is_dense(job: "Job") -> bool:
    from peftplan.analytic.shown import is_dense  # which few jobs need

    return is_dense(job)


def _rests_as_rehearsed(job: "Job") -> bool:
    """Whether layers take turns as was rehearsed (tests/rehearse/axolotl_lisa.jsonl): of a dense model, under an AdamW."""
    return _is_dense(job) and job.setup.by.name in TAKING_TURNS and str(job.setup.optim).startswith(("adamw", "paged_adamw"))


def _masks_as_rehearsed(job: "Job") -> bool:
    """Whether tokens are masked as was rehearsed (tests/rehearse/axolotl_diffusion.jsonl)."""
    setup = job.setup
    alone = job.distributed is None and job.method_name == "full" and job.architecture.model_type == "llama"
    plain = setup.attn_implementation == "sdpa" and not setup.padding
    return alone and plain and setup.dtype == setup.autocast == "bf16"
