"""Jobs with virtual tokens that peft, transformers or torch refuse, with their messages, and those without formulas.

Sources: peft, peft_model.py (the class of each task: `forward`, `_prefix_tuning_forward`); transformers, the models'
classes of each task; torch, nn/functional.py (`cross_entropy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from peftplan.arch.modules import Architecture
from peftplan.errors import InputError, NeedsTraceError, NoEngineError, RefusedError
from peftplan.job.tasks import as_told
from peftplan.methods.adaptation import PROMPTED
from peftplan.versions import named

if TYPE_CHECKING:
    from peftplan.job.job import Job

PREFIX = "PREFIX_TUNING"
LANGUAGE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
SCORED_TOKENS = ("TOKEN_CLS", "MASKED_LM")
"""Tasks whose labels peft does not lengthen by the virtual tokens; it trains a masked language model as FEATURE_EXTRACTION."""
PEFT_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""peft's `TaskType`."""
SOUND = ("whisper",)
"""Types that read no text: they get no task type, since peft's classes for tasks pass `input_ids`. An adapter config that states
one is counted, but does not run."""
SHAPED_BY_LABELS = ("bloom", "falcon", "mpt")
"""Types whose token classifier views its scores in the shape of the labels before the loss compares the two."""


def beside_virtual_tokens(architecture: Architecture, virtual: object, seq_len: int) -> Architecture:
    """The architecture with the positions that virtual tokens leave to a sequence. `seq_len`: 0 if it is still to be chosen.

    Raises InputError for a longer sequence: BERT's table is sliced too short for it, GPT-2's is read behind its end.
    """
    if architecture.max_positions is None or not isinstance(virtual, int):
        return architecture
    positions = architecture.max_positions
    left = positions - virtual
    if left < 1:
        raise InputError("num_virtual_tokens", virtual, f"accepted: below {positions}, the positions of the model")
    if seq_len > left:
        raise InputError(
            "seq_len", seq_len, f"accepted: up to {left}, the model's {positions} positions less {virtual} virtual tokens"
        )
    return replace(architecture, max_positions=left)


def check_virtual_tokens(job: Job) -> None:
    """Raises RefusedError if the libraries do, NeedsTraceError if a prefix has no formulas.

    NoEngineError, which leaves a job its counts, where earlier versions of the libraries ran what these refuse.
    """
    peft_type = job.method.peft_type if job.method else None
    if peft_type == PREFIX and job.setup.gradient_checkpointing:
        raise RefusedError(f"{named('peft')} refuses it: ValueError: PREFIX_TUNING does not work with gradient checkpointing.")
    if peft_type == PREFIX and job.setup.router_loss and (job.setup.padding or job.setup.by.always_masks):
        raise RefusedError(
            f"{named('transformers')} fails in the first forward of a mixture with a prefix: its load-balancing loss compares "
            "the logits of the routers with a mask that peft has lengthened by the prefix: RuntimeError: The size of tensor a "
            "must match the size of tensor b (`load_balancing_loss_func`); set router_aux_loss_coef to 0, here --no-router-loss"
        )
    if peft_type not in (*PROMPTED, PREFIX):
        return
    if job.architecture.model_type in SOUND:
        raise NoEngineError(
            f"{named('transformers')} refuses to run it: ValueError: You have to provide either input_ids or inputs_embeds "
            f"(peft's class for a task passes no sound to {job.architecture.model_class})"
        )
    if peft_type == PREFIX:
        _check_prefix(job)
    else:
        _check_prompts(job)


def check_prompted_task(arch: Architecture, adapter: Mapping[str, object]) -> None:
    """Raises RefusedError if peft has no class for the task of a model with virtual tokens, as `get_peft_model` does.

    `adapter` is the adapter config that was given, if any.
    """
    task = as_told(arch, adapter).task_type
    if task in PEFT_TASKS and arch.vocab_size and (arch.model_type not in SOUND or "task_type" in adapter):
        return
    if arch.task_type in PEFT_TASKS and arch.model_type not in SOUND:
        raise RefusedError(
            f"task_type: the adapter config states none, without which {named('peft')} makes no virtual tokens (KeyError: None); "
            f"accepted: {arch.task_type}"
        )
    if arch.model_type in SOUND or not arch.vocab_size:
        why = f"virtual tokens precede text, which {arch.model_class} does not read; accepted: other methods, such as lora"
    else:
        why = f"peft has no virtual tokens for {arch.task_type}; accepted: {', '.join(PEFT_TASKS)}"
    raise RefusedError(f"{named('peft')} refuses it: KeyError: None ({why})")


def _check_prefix(job: Job) -> None:
    arch = job.architecture
    if arch.task_type == "MASKED_LM":  # its adapter config says FEATURE_EXTRACTION, whose forward passes the prefix on
        raise NeedsTraceError("a prefix before a masked language model")
    if arch.task_type not in LANGUAGE:  # peft looks for an argument that transformers renamed to `cache`
        raise NoEngineError(
            f"{named('peft')} refuses to run it: "
            "ValueError: Model does not support past key values which are required for prefix tuning."
        )
    if any(a.variant == "mla" and a.num_attention_heads > 1 for block in arch.blocks for a in block.attentions):
        raise RefusedError(
            f"{named('transformers')} refuses it: RuntimeError: a prefix with keys of each head beside a cache of latents"
        )
    from peftplan.methods.virtual_tokens import PrefixTuningConfig, check_prefix

    assert isinstance(job.config, PrefixTuningConfig)
    check_prefix(arch, job.config, batch_size=job.setup.batch_size)


def _check_prompts(job: Job) -> None:
    """Prompts reach a model as `inputs_embeds`, and make its scores of tokens more than the labels; a language model's labels get
    those of the prompts, which the logits of the last tokens leave out.
    """
    from peftplan.methods.virtual_tokens import PromptLearningConfig

    arch, setup = job.architecture, job.setup
    translates = {"encoder", "decoder"} <= {block.stack for block in arch.blocks}
    if translates and arch.task_type == "SEQ_CLS":
        raise RefusedError(
            f"{named('transformers')} refuses it: NotImplementedError: Passing input embeddings is currently not supported for "
            f"{arch.model_class}"
        )
    if translates and arch.task_type == "QUESTION_ANS":
        raise RefusedError(
            f"{named('transformers')} refuses it: ValueError: If no `decoder_input_ids` or `decoder_inputs_embeds` are passed, "
            "`input_ids` cannot be `None`. Please pass either `input_ids` or `decoder_input_ids` or `decoder_inputs_embeds`."
        )
    assert isinstance(job.config, PromptLearningConfig)
    prompts = setup.batch_size * job.config.num_virtual_tokens
    if arch.task_type in SCORED_TOKENS:
        labels = setup.batch_size * setup.seq_len
        raise RefusedError(f"{named('torch')} refuses it: {_mismatch(arch, labels=labels, scored=labels + prompts)}")
    if setup.logits_to_keep is not None:
        scored = setup.batch_size * setup.logits_to_keep
        raise RefusedError(f"{named('torch')} refuses it: {_mismatch(arch, labels=scored + prompts, scored=scored)}")


def _mismatch(arch: Architecture, *, labels: int, scored: int) -> str:
    if arch.task_type != "TOKEN_CLS" or arch.model_type not in SHAPED_BY_LABELS:
        return f"ValueError: Expected input batch_size ({scored}) to match target batch_size ({labels})."
    classes = arch.modules[-1].shape("weight")[0]
    return f"RuntimeError: shape '[{labels}, {classes}]' is invalid for input of size {scored * classes}"
