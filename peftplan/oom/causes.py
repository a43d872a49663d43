"""From what a message says to its cause and the next thing to try: one rule per cause, the most certain first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from peftplan.oom.kept import Earlier, Kept
from peftplan.oom.message import Frame, Message
from peftplan.units import MIB, format_bytes
from peftplan.versions import SHORTER_ALLOC_CONF

OTHER_PROCESS = 1024 * MIB
"""What is in use beyond this process and its largest possible context is somebody else's from here on."""
LARGEST_CONTEXT = 2048 * MIB
"""More than any CUDA context that is recorded, old stacks included (data/context.json: 1,823 MiB)."""
CLEARLY_FREE = 256 * MIB
"""A request that fails although so much more is free did not fail for want of memory; less may be rounding."""
WORTH = 0.02
"""Cached memory below this share of a card is no cause."""

LONGER = 1.2
"""A request larger than any earlier one of its line by this factor is a longer batch."""
NOTHING = Earlier()


class Cause(NamedTuple):
    """Why memory ran out: a name for programs, the evidence in the message, and what to try next, first things first."""

    name: str
    evidence: str
    advice: tuple[str, ...]


class Place(NamedTuple):
    """A part of a program, known by the frames of a traceback: any of `marks` in a function, a file or a line of code."""

    name: str
    marks: tuple[str, ...]
    says: str
    advice: tuple[str, ...]


PLACES: tuple[Place, ...] = (
    Place(
        "evaluation",
        ("nested_concat", "evaluation_loop", "prediction_loop", "prediction_step", "torch_pad_and_concatenate", "evaluate"),
        "it was evaluating: Trainer keeps the logits of every sample, of the whole vocabulary, until the end",
        (
            "set preprocess_logits_for_metrics (keep argmax or what the metric needs), or prediction_loss_only=True",
            "set eval_accumulation_steps=1, so that logits move to the host, and a smaller per_device_eval_batch_size",
        ),
    ),
    Place(
        "kbit preparation",
        ("prepare_model_for_kbit_training",),
        "peft was casting what is not quantized to fp32 (embeddings, head, norms; experts of MoE models too)",
        (
            "skip prepare_model_for_kbit_training (--no-kbit-prepare shows what that saves)",
            "call model.enable_input_require_grads() instead, where checkpointing needs it",
        ),
    ),
    Place(
        "saving",
        ("merge_and_unload", "save_pretrained", "_save_checkpoint", "_save_optimizer", "state_dict"),
        "it was saving or merging: both make copies in addition to what training keeps",
        ("merge on the CPU after training", "save the adapter alone, or move tensors to the host first"),
    ),
    Place(
        "load",
        ("from_pretrained", "load_state_dict", "_load_state_dict_into_model", "_load_parameter_into_model", "load_checkpoint"),
        "it was loading the model",
        (
            "load in the dtype that you train in (dtype=torch.bfloat16), or quantized",
            "check that nothing else is on the card, and that the weights alone fit it",
        ),
    ),
    Place(
        "load",
        ("_move_model_to_device", "prepare_model", "model.to(", "module.to(", ".cuda()"),
        "it was moving the model to the card",
        ("the weights in this dtype do not fit beside what is there: quantize, use a smaller dtype or model, or a larger card",),
    ),
    Place(
        "step",
        (
            "optimizer.step",
            "optim.step",
            "_init_group",
            "exp_avg",
            "run_optimizer_step",
            "_multi_tensor_adamw",
            "_single_tensor_adamw",
        ),
        "it was in the optimizer's step: states are made in the first one, and foreach optimizers copy what they update",
        (
            "use an 8-bit or paged optimizer (optim=paged_adamw_8bit), or adafactor",
            "train fewer parameters: LoRA instead of full fine-tuning",
        ),
    ),
    Place(
        "backward",
        ("loss.backward", "accelerator.backward", "run_backward", "_engine_run_backward", "self.backward"),
        "it was in backward: gradients, and what forward kept for it",
        (
            "turn gradient checkpointing on, or make the micro batch smaller with gradient_accumulation_steps for the rest",
            "use a loss that never materializes all logits (SFTTrainer's default, use_liger_kernel)",
        ),
    ),
    Place(
        "loss",
        ("cross_entropy", "log_softmax", "logits.float()", "ForCausalLMLoss", "lm_head", "loss_function"),
        "it was at the loss: logits are tokens × vocabulary, in fp32 and more than once",
        (
            "use a loss that never materializes all logits (SFTTrainer's default, use_liger_kernel)",
            "make the micro batch smaller or the sequences shorter",
        ),
    ),
    Place(
        "attention",
        ("eager_attention_forward", "attn_weights", "softmax(attn"),
        "it was in eager attention, which stores scores of heads × tokens × tokens",
        ("set attn_implementation to sdpa or flash_attention_2",),
    ),
    Place(
        "generation",
        ("generate(", "_sample(", "generation/utils"),
        "it was generating: the KV cache grows with every token",
        ("generate fewer sequences at once, or fewer new tokens; wrap it in torch.no_grad()",),
    ),
    Place(
        "forward",
        ("forward", "compute_loss", "training_step"),
        "it was in forward: activations grow with tokens, and stay until backward",
        ("turn gradient checkpointing on", "make the micro batch smaller or the sequences shorter"),
    ),
)
"""The first that matches from the innermost frame outwards wins, in this order."""


def place_of(frames: tuple[Frame, ...]) -> Place | None:
    """Where in a program memory ran out; None where the traceback does not say."""
    for place in PLACES:
        if any(mark in text for frame in frames for text in (frame.function, frame.code, frame.file) for mark in place.marks):
            return place
    return None


def causes(message: Message, earlier: Earlier = NOTHING) -> tuple[Cause, ...]:
    """Every cause that the message gives evidence for, the most certain first; at least one. `earlier`: what a snapshot adds."""
    certain = tuple(cause for rule in RULES if (cause := rule(message)) is not None)
    if earlier.kept is not None:
        certain = (_kept(earlier.kept), *certain)
    elif earlier.most_at_once is not None and message.requested > LONGER * earlier.most_at_once:
        certain = (_longer(message.requested, earlier.most_at_once), *certain)
    place = place_of(message.frames)
    where = () if place is None else (Cause(place.name, place.says, place.advice),)
    return (*certain, *where) or (_too_large(message),)


def _kept(leak: Kept) -> Cause:
    return Cause(
        "kept",
        f"{format_bytes(leak.bytes)} in {leak.blocks:,} blocks are alive that earlier steps would have freed: the program keeps "
        "them, or runs forward without backward and without torch.no_grad()",
        (
            "keep numbers, not tensors: loss.item(), outputs.detach().cpu()",
            "evaluate under torch.no_grad(), and drop outputs before the next batch",
        ),
    )


def _longer(requested: int, before: int) -> Cause:
    return Cause(
        "longer_batch",
        f"this line requests {format_bytes(requested)}, and requested at most {format_bytes(before)} in earlier steps: "
        "this batch is longer",
        (
            "cut sequences at a length that fits (`peftplan fit --max seq-len`)",
            "group sequences by length, and take fewer of the long ones at once",
        ),
    )


def _beyond_the_card(message: Message) -> Cause | None:
    if message.capacity is None or message.allocated is None or message.allocated <= message.capacity:
        return None
    return Cause(
        "host_memory",
        f"{format_bytes(message.allocated)} are allocated on a card of {format_bytes(message.capacity)}: the driver uses host "
        "memory (Windows, or managed memory), so the job exceeded the card long before",
        ("treat it as a job that does not fit: `peftplan fit` says which size does",),
    )


def _larger_than_the_card(message: Message) -> Cause | None:
    if message.capacity is None or message.requested <= message.capacity:
        return None
    return Cause(
        "one_tensor",
        f"one tensor of {format_bytes(message.requested)} is larger than the card ({format_bytes(message.capacity)})",
        ("look at its line in the traceback: a length or a batch is not what you think, or a tensor covers all samples at once",),
    )


def _another_process(message: Message) -> Cause | None:
    if message.capacity is None or message.free is None or (message.process is None and message.reserved is None):
        return None
    own = message.process or (message.reserved or 0) + LARGEST_CONTEXT
    elsewhere = message.capacity - message.free - own
    listed = sum(message.others[1:])
    if max(elsewhere, listed) < OTHER_PROCESS or _beyond_the_card(message):
        return None
    return Cause(
        "another_process",
        f"{format_bytes(max(elsewhere, listed))} of the card are in use beyond this process",
        (
            "stop the other process (nvidia-smi lists them; a notebook or an earlier run keeps what it holds)",
            "choose a free card",
        ),
    )


def _limited(message: Message) -> Cause | None:
    if message.free is None or message.free < message.requested + CLEARLY_FREE or _larger_than_the_card(message):
        return None
    why = (
        f"of {format_bytes(message.allowed)} allowed"
        if message.allowed is not None
        else "of a limit that the message does not state"
    )
    return Cause(
        "limit",
        f"{format_bytes(message.free)} are free for {format_bytes(message.requested)}: it failed because {why}, or because the "
        "driver could not provide them in one piece",
        (
            "look for torch.cuda.set_per_process_memory_fraction, and for the limit of a container or a MIG slice",
            "check whether the card also drives a display",
        ),
    )


def _fragmentation(message: Message) -> Cause | None:
    if message.reserved is None or message.allocated is None:
        return None
    cached = message.reserved - message.allocated
    if cached < max(message.requested, WORTH * (message.capacity or 0)):
        return None
    return Cause(
        "fragmentation",
        f"torch has {format_bytes(cached)} cached that no tensor uses. That is more than the {format_bytes(message.requested)} "
        "requested, but not in one piece",
        (
            f"set PYTORCH_ALLOC_CONF=expandable_segments:True (PYTORCH_CUDA_ALLOC_CONF before {SHORTER_ALLOC_CONF.named})",
            "pad batches to few lengths, so that freed blocks fit again",
        ),
    )


def _too_large(message: Message) -> Cause:
    requested = format_bytes(message.requested)
    if message.allocated is None:
        evidence = f"{requested} are requested and not free; the message does not say how much of the card this process uses"
    else:
        so_far = format_bytes(message.allocated)
        evidence = f"the job needs more than the card has: {so_far} are allocated already, and another {requested} are requested"
    return Cause(
        "too_large",
        evidence,
        ("run `peftplan fit MODEL --gpu CARD` with the options of the job: it says which size fits, and which other plans do",),
    )


RULES: tuple[Callable[[Message], Cause | None], ...] = (
    _beyond_the_card,
    _larger_than_the_card,
    _another_process,
    _limited,
    _fragmentation,
)
