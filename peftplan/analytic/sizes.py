"""The named sizes of a job, and the facts about batch and sequence that decide which operations run."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from peftplan.arch.modules import Architecture
from peftplan.arrays import Fact, Size
from peftplan.job.loss_sizes import OF_ANSWER, OF_PASSAGES, LossSizes
from peftplan.memory.fused_attention import FLASH_BLOCK, MASK_GRADIENT_MULTIPLE, MASK_MULTIPLE

MULTIPLES = (8, 16, 32, 64, 128, 256)
"""Multiples to which kernels round the sequence length up."""
TABLE_MULTIPLE = 8192
"""Multiple to which Unsloth rounds the rows of rotary tables up (`_round_rope_size`)."""
BLOCK = 64
"""Rows that the memory-efficient attention kernel processes at a time."""


def windows_of(architecture: Architecture) -> tuple[int, ...]:
    """The longest sequence without a mask for each sliding window of a model, and that of which an indexer chooses every key;
    sorted, without duplicates.

    Source: transformers, masking_utils.py: a mask is made from `kv_length >= local_attention_size` on. A bidirectional window
    states the size of one side.
    """
    attentions = [a for block in architecture.blocks for a in block.attentions]
    windows = {(a.window if a.causal else a.window // 2) - 1 for a in attentions if a.window}
    return tuple(sorted(windows | {a.num_chosen_keys for a in attentions if a.num_chosen_keys is not None}))


def between_chunks(seq_len: Size, architecture: Architecture) -> Iterator[Fact]:
    """Whether Mamba 2 has no record of a length, for each chunk size of a model: it is not a whole number of chunks, or one chunk
    of a mixer that was recorded with more alone."""
    for chunk in _chunk_sizes(architecture):
        yield seq_len % chunk > 0
    yield from () if knows_one_chunk(architecture) else one_chunk(seq_len, architecture)


def one_chunk(seq_len: Size, architecture: Architecture) -> Iterator[Fact]:
    """Whether a length is one chunk of Mamba 2, for each chunk size of a model."""
    for chunk in _chunk_sizes(architecture):
        yield seq_len == chunk


def knows_one_chunk(architecture: Architecture) -> bool:
    """Whether a mixer was recorded with one chunk too: Nemotron H's, of several groups of heads."""
    spaces = [block.state_space for block in architecture.blocks if block.state_space is not None]
    return architecture.model_type == "nemotron_h" and all(space.groups > 1 for space in spaces)


def _chunk_sizes(architecture: Architecture) -> list[int]:
    return sorted({block.state_space.chunk_size for block in architecture.blocks if block.state_space is not None})


DIGITS = 25
"""Binary digits of a number of chunks: enough for every length that a setup takes."""


def num_chunks(seq_len: Size, architecture: Architecture) -> Iterator[Fact]:
    """The number of chunks of a delta rule, digit by digit: its code loops over them."""
    if any(block.delta_rule is not None for block in architecture.blocks):
        from peftplan.memory.delta_rule import CHUNK

        chunks = -(-seq_len // CHUNK)
        yield from ((chunks >> digit) & 1 for digit in range(DIGITS))


class Limits(NamedTuple):
    """Tokens of a batch, and of a row, above which the kernels of a package allocate otherwise."""

    of_batch: tuple[int, ...] = ()
    of_row: tuple[int, ...] = ()


NO_LIMITS = Limits()


def shape_facts(
    batch_size: Size, seq_len: Size, architecture: Architecture, loss: LossSizes, limits: Limits = NO_LIMITS
) -> tuple[Fact, ...]:
    """The facts that decide which operations run: more than one sequence, unaligned masks, exceeded windows, chunks of the loss
    and of Mamba 2.

    `batch_size` and `seq_len` are integers or arrays; `seq_len` includes virtual tokens.
    """
    positions = any(a.positions == "relative" for block in architecture.blocks for a in block.attentions)
    multiples = (MASK_MULTIPLE, MASK_GRADIENT_MULTIPLE) if positions else (MASK_MULTIPLE,)  # a mask of positions has a gradient
    ragged: Iterator[Fact] = (
        length % multiple > 0 for length in (seq_len, seq_len - loss.virtual_tokens) for multiple in multiples
    )
    exceeded: Iterator[Fact] = (seq_len > window for window in windows_of(architecture))
    tokens: Size = batch_size * seq_len
    limited: tuple[Fact, ...] = (
        *(tokens > most for most in limits.of_batch),
        *(seq_len > most for most in limits.of_row),
    )
    chunked: Iterator[Fact] = chain(between_chunks(seq_len, architecture), one_chunk(seq_len, architecture))
    looped: Iterator[Fact] = num_chunks(seq_len, architecture)
    return (batch_size > 1, *limited, *ragged, *exceeded, *chunked, *looped, *loss.facts(batch_size, loss.length(seq_len)))


def sizes(b: Size, s: Size, *, virtual_tokens: int, loss: LossSizes) -> dict[str, Size]:
    """Name → size for b sequences of s tokens, integers or arrays; k counts virtual tokens too.

    `s%64` is s rounded up to a multiple of 64, `s/64` the number of blocks of 64 rows, `s+1` one more, `s+2` two.
    """
    by_name = {"b": b, "s": s, "k": s + virtual_tokens, "s/2": s // 2}
    by_name |= {f"{name}%{m}": -(-by_name[name] // m) * m for name in ("s", "k", "s/2") for m in MULTIPLES}
    by_name |= {f"{name}/{size}": -(-by_name[name] // size) for name in ("s", "k") for size in (BLOCK, FLASH_BLOCK)}
    by_name |= {f"{name}{more:+}": by_name[name] + more for name in ("s", "k") for more in (3, 2, 1, -1)}
    by_name |= {"b/2": b // 2, "b/3": b // 3, "4b": 4 * b}
    by_name |= {f"b·{name}": b * by_name[name] for name in ("s", "k")}
    of_batch: tuple[int, ...] = (TABLE_MULTIPLE, 32, FLASH_BLOCK, MASK_MULTIPLE)
    for name, multiple in (("s", TABLE_MULTIPLE), *(("b·s", multiple) for multiple in of_batch)):
        by_name[f"{name}%{multiple}"] = -(-by_name[name] // multiple) * multiple
    if loss.shared_by > 1:  # what ranks together have of a row
        by_name["row"] = s * loss.shared_by
        by_name |= {f"row%{m}": -(-by_name["row"] // m) * m for m in MULTIPLES}
    for name in ("s", "b·s"):
        by_name[f"{name}>{MASK_MULTIPLE}"] = (by_name[name] // MASK_MULTIPLE + 1) * MASK_MULTIPLE
    if loss.answers:
        answer = s - (loss.completion or 0)
        of_row = sizes(b // b, answer, virtual_tokens=virtual_tokens, loss=loss._replace(answers=False, completion=None))
        by_name |= {f"{OF_ANSWER}{name}": size for name, size in of_row.items()}
    if loss.passages:
        of_rows = sizes(loss.passages * b, s, virtual_tokens=virtual_tokens, loss=loss._replace(passages=0))
        by_name |= {f"{OF_PASSAGES}{name}": size for name, size in of_rows.items()}
    return by_name | loss.named(b, loss.length(s + virtual_tokens))
