"""Sizes of losses that never materialize all logits: how many tokens they score, and how many at once.

Formulas of batch and sequence, which may be integers or arrays. n tokens, h hidden size, v vocabulary.
Sources: trl `kernels/chunked_logprob.py`; liger-kernel `ops/fused_linear_cross_entropy.py`; unsloth_zoo 2026.10.9
`fused_losses/fused_linear.py` (`fused_linear_rows`).
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from peftplan.arrays import Fact, Size, larger, smaller
from peftplan.errors import RefusedError
from peftplan.units import GIB, ceil_div
from peftplan.versions import named

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture

TOKEN_TILE = 4096
VOCAB_TILE = 32768
"""Width of TRL's tiles of logits, in vocabulary entries. The buffer has this width for any vocabulary."""

CHUNKS = 8
"""Chunks of torchtune's loss (`num_output_chunks`)."""

MAX_ROWS = 4096
"""Unsloth's tokens per chunk at most, and per tile of the pass for frozen heads (`_MAX_ROWS`, `_BWD_ROWS`)."""
FEWEST_LOGITS = 512 * 151936
"""The least logits of an Unsloth chunk, approximately (`_MIN_LOGITS`); it also has at least 512 tokens."""
FEWEST_ROWS = 512
CHUNK_BYTES = 2 * GIB
FLASH_FROM_ROWS = 4096
"""From this many scored tokens on, a frozen head never holds a whole row of logits (`_flash_min_rows` of a large card)."""
SPLIT_COLUMNS = 16384
"""Vocabulary entries per partial softmax (`_SPLIT_COLS`)."""
FUNCTION_BYTES, BYTES_PER_LOGIT = 4 * GIB, 16
"""What a chunk of Unsloth's loss by torch.func may take (`_CE_TARGET_GB_CAP`), and a logit takes (`_CE_BYTES_PER_LOGIT`)."""
HALF, WIDE = 2, 4
"""Bytes of a 16-bit and of an fp32 number."""
MOST_DOUBLINGS = 40
"""No batch has 2⁴⁰ tokens."""

LIGER_MODELS = frozenset(
    {
        "deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4",
        "gemma4_text", "glm4", "glm4v", "glm4v_moe", "gpt_oss", "granite", "hunyuan_v1_dense", "hunyuan_v1_moe", "internvl",
        "llama", "llama4", "llama4_text", "llava", "ministral", "mistral", "mixtral", "mllama", "mllama_text_model",
        "muse_glimmer", "nemotron", "olmo2", "olmo3", "paligemma", "phi3", "pixtral", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text",
        "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
        "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "smollm3", "smolvlm",
    }
)  # fmt: skip
"""Model types that liger-kernel patches (`MODEL_TYPE_TO_APPLY_LIGER_FN`). All others keep the full loss."""


def check_liger(model_type: str) -> None:
    """Raises RefusedError for a model that liger-kernel does not patch."""
    if model_type not in LIGER_MODELS:
        raise RefusedError(f"loss: {named('liger-kernel')} patches no {model_type} models; accepted: full, trl-chunked")


CUT = "cut-cross-entropy"
CUT_APART = "cut-apart"
READ_THROUGH = ("liger", CUT)
"""Losses that read the weight of the head inside a wrapper for trained tokens."""
SORTED_BYTES = 12
"""Bytes of an fp32 key and its int64 index, which CUB sorts beside what it reads; 0.1 MB more is left out."""
LOCKED_ROWS, LOCKED_COLUMNS = 128, 64
"""Rows, and columns, of a gradient that share a lock in the kernels of cut cross entropy."""


def cut_scales(loss: str, architecture: "Architecture") -> bool:
    """Whether cut cross entropy runs on a model whose logits are scaled."""
    return loss == CUT and "scale" in architecture.logits_ops


def cut_without_formula(loss: str, architecture: "Architecture") -> str | None:
    """Why cut cross entropy has no formula for a model whose logits are scaled. Granite's hidden states are divided instead
    (cut_cross_entropy, transformers/granite.py:75, granitemoe.py); how others are scaled was not rehearsed."""
    unknown = cut_scales(loss, architecture) and not architecture.model_type.startswith("granite")
    return f"{CUT} of {architecture.model_type}, whose logits are scaled (no formula yet)" if unknown else None


def check_halves(*dtypes: str) -> None:
    """Raises RefusedError for hidden states or a head that cut cross entropy does not differentiate (`cce_backward_kernel`)."""
    if {"bf16", "fp16"} < {"bf16", "fp16", *dtypes}:
        raise RefusedError(f"loss: {CUT} asserts hidden states and a head in 16 bits; use --dtype bf16")


OF_SHARED_ROWS = SHARED, SHARED_CHUNKS = "shared-rows", "shared-rows-chunked"
"""Cross entropies of a rank's tokens of rows that several ranks share (ms-swift, trainers/utils.py, `per_token_loss_func_sp`)."""
MASKED = "masked-tokens"
"""Cross entropy of tokens that a program masks and the model restores (axolotl's diffusion)."""
OF_FUNCTION = ("per-token", "eaft", "eaft-behind", SHARED, SHARED_CHUNKS, MASKED)
"""Losses that a program makes of all logits by a function of its own, such as Trainer's `compute_loss_func`."""
SHARED_ROWS, OF_CHUNK = 2048, 3
"""Tokens of a chunk of such a loss (`CELOSS_PARALLEL_SIZE` in ms-swift's example), and how much of a chunk backward takes."""
RECEIVED: Final = "received-kl"
"""Cross entropy, and divergence from logits that a teacher on other GPUs sends."""
NO_UPCAST: Final = "full-no-upcast"
"""Cross entropy of logits in their own dtype."""
ALL_LOGITS = ("full", NO_UPCAST, "te-parallel", "unsloth-logits", RECEIVED, *OF_FUNCTION)
"""Losses of logits that the model returns."""


CHORD: Final = "chord"
"""The loss of completions, and of rows whose answers are given."""
OF_PASSAGES = "passages "
"""What named sizes of the passages of all queries begin with."""
OF_ANSWER = "answer "
"""What named sizes of a row whose answer is given begin with."""


class LossSizes(NamedTuple):
    """The inputs of a loss's sizes besides the batch.

    `prompted`: virtual tokens precede each row and have no labels. `kept`: how many of a row's last tokens have logits; None for
    all. `completion`: how many of a row's tokens are scored, the last ones; None for all that have a label.
    """

    loss: str
    hidden_size: int
    vocab_size: int
    virtual_tokens: int
    prompted: bool
    kept: int | None = None
    completion: int | None = None
    of_pairs: bool = False
    """Whether every other row, a chosen one, is scored whole."""
    by_rows: bool = False
    """Whether it is made of one row after another."""
    chosen_apart: bool = False
    """Whether the logits of chosen rows are copied where they are of more than one row: of one, they are a view."""
    at_once: int | None = None
    """Scored tokens of which distributions are compared at a time; None: of all."""
    block: int = 0
    """Tokens of each block that is written behind an anchor."""
    before: int = 0
    """The tokens before the first anchor."""
    multiple: int = 1
    """What prompts, and completions, are each padded to a multiple of in training."""
    shared_by: int = 1
    """Ranks that share a row."""
    parts: int = 1
    """Equal parts into which these divide it."""
    trains_head: bool = False
    """Whether the head, or a copy of it, trains."""
    passages: int = 0
    """Passages of each query, which a forward of their own reads."""
    answers: bool = False
    """Whether a row whose answer is given is read beside completions, as long as a prompt."""
    hidden_bytes: int = WIDE
    """Bytes of a number of the hidden states that reach the loss."""

    def row(self, seq_len: Size) -> Size:
        """Tokens of a row in training, or a rank's share of them, of prompts and completions of `seq_len` tokens."""
        if self.shared_by > 1:
            return seq_len // self.shared_by
        if self.completion is None or self.multiple == 1:
            return seq_len
        prompt = -(-(seq_len - self.completion) // self.multiple) * self.multiple
        return prompt + self._padded(self.completion)

    def uneven(self, seq_len: Size) -> Fact:
        """Whether the ranks that share a row would get unlike parts of it."""
        return self.shared_by > 1 and seq_len % self.parts > 0

    def _padded(self, tokens: int) -> int:
        return ceil_div(tokens, self.multiple) * self.multiple

    def length(self, seq_len: Size) -> Size:
        """Hidden states per row that reach the loss. `seq_len` includes virtual tokens."""
        return seq_len if self.prompted else seq_len - self.virtual_tokens

    def named(self, b: Size, length: Size) -> dict[str, Size]:
        """Name → size for b rows of `length` hidden states, integers or arrays."""
        if self.loss in ALL_LOGITS:
            n = self._scored(b, length)
            rest = {} if self.at_once is None else {"rest": _rest(n, self.at_once)}
            if self.loss == SHARED_CHUNKS:
                rest["rows"] = smaller(b * length, SHARED_ROWS)
                of_second = larger(smaller(b * length - SHARED_ROWS, SHARED_ROWS), 0)
                rest["rows before"] = larger(OF_CHUNK * of_second + SHARED_ROWS - OF_CHUNK * SHARED_ROWS, 0)
            return {"n": n, "n/2": n // 2, "n/3": n // 3, "n/b": n // b, **rest, **self._of_blocks(length)}
        if self.loss == "liger":
            n, rows = self._liger(b, length)
            return {"n": n, "rows": rows, "rest": _rest(n, rows)}
        n = self._scored(b, length)
        if self.loss == "trl-chunked":
            return {"n": n, "s-1": length - 1, "rows": smaller(n, TOKEN_TILE), "rest": _rest(n, TOKEN_TILE)}
        if self.loss == CUT:
            return {"n": n, "n/128": -(-n // LOCKED_ROWS)}
        if self.loss == CUT_APART:
            return {"n": b * length, "n/128": -(-b * length // LOCKED_ROWS)}
        if self.loss == "torchtune-linear":
            return {"n": n, "chunk": n // CHUNKS, "longer": n // CHUNKS + 1}
        if self.loss in ("torchtune-kl", "torchtune-chunked"):
            return {"n": b * length, "chunk": length // CHUNKS, "longer": length // CHUNKS + 1}
        tile = smaller(n, MAX_ROWS)
        by_itemsize = {
            f"rows{size}": unsloth_rows(n, hidden_size=self.hidden_size, vocab_size=self.vocab_size, itemsize=size)
            for size in (HALF, WIDE)
        }
        sizes = {
            "n": n,
            "tile": tile,
            "tile rest": _rest(n, MAX_ROWS),
            **by_itemsize,
            "function rows": self._by_function(b * length),
        }
        return sizes | {f"{name} rest": _rest(n, rows) for name, rows in by_itemsize.items()}

    def _of_blocks(self, length: Size) -> dict[str, Size]:
        """The anchors of a row, and its lengths before each of its blocks' tokens is written."""
        if not self.block:
            return {}
        anchors = (length - self.before) // 2 // self.block
        return {"anchors": anchors} | {f"s-{missing}anchors": length - missing * anchors for missing in range(1, self.block + 1)}

    def facts(self, b: Size, length: Size) -> tuple[Fact, ...]:
        """The facts that decide which operations run: any tokens, more than one chunk, more than two, tokens without logits; of a
        loss of one row after another, how many rows; of distributions compared part by part, how many parts.
        """
        if self.loss in (*ALL_LOGITS, "liger"):
            without_logits: tuple[Fact, ...] = () if self.kept is None else (length > self.kept,)
            if self.loss in ALL_LOGITS and self.at_once is not None:
                return (-(-self._scored(b, length) // self.at_once),)
            if self.loss in ALL_LOGITS:
                of_rows: tuple[Fact, ...] = (b,) if self.by_rows or self.block else (b > 2,) if self.chosen_apart else ()
                return (*without_logits, *of_rows)
            projected, rows = self._liger(b, length)
            return (projected > 0, projected > rows, projected > 2 * rows, *without_logits)
        if self.loss in (CUT, CUT_APART):
            return ()
        n: Size = self._scored(b, length)
        if self.loss == "trl-chunked":
            return (n > 0, n > TOKEN_TILE, n > 2 * TOKEN_TILE)
        if self.loss == "torchtune-linear":
            return (n >= CHUNKS, n % CHUNKS)
        if self.loss in ("torchtune-kl", "torchtune-chunked"):
            return (length >= CHUNKS, length % CHUNKS)
        sizes: dict[str, Size] = self.named(b, length)
        half, wide = sizes[f"rows{HALF}"], sizes[f"rows{WIDE}"]
        of_chunks: list[Fact] = [fact for rows in (MAX_ROWS, half, wide) for fact in _full_chunks(n, rows)]
        return (n > 0, n >= FLASH_FROM_ROWS, *of_chunks, b * length > sizes["function rows"])

    def _by_function(self, tokens: Size) -> Size:
        """Tokens per chunk of Unsloth's loss by torch.func: a multiple of four chunks, whose logits and the gradients besides
        fill 4 GiB (unsloth_zoo, `fused_losses/cross_entropy_loss.py`, `get_chunk_size`), less the gradient of the hidden states
        and two of a head that trains.
        """
        of_head = 2 * self.vocab_size * self.hidden_size * HALF * self.trains_head
        left = FUNCTION_BYTES - tokens * self.hidden_size * self.hidden_bytes - of_head
        left = left + (left <= 0) * (FUNCTION_BYTES - left)
        wanted = tokens * self.vocab_size * BYTES_PER_LOGIT
        chunks = 1 + (wanted > left) * (4 * -(-wanted // (4 * left)) - 1)
        return -(-tokens // smaller(chunks, larger(tokens, 1)))

    def _liger(self, b: Size, length: Size) -> tuple[Size, Size]:
        """(rows that Liger projects, scored or not; rows per chunk)."""
        n = b * (length if self.kept is None else self.kept)
        return n, liger_rows(n, hidden_size=self.hidden_size, vocab_size=self.vocab_size)

    def _scored(self, b: Size, length: Size) -> Size:
        """Scored labels: all but the first of each row, which counts too if virtual tokens precede it."""
        labels = length - max(self.virtual_tokens * self.prompted, 1)
        of_completion = labels if self.completion is None else smaller(labels, self._padded(self.completion))
        return b // 2 * (labels + of_completion) if self.of_pairs else b * of_completion


CHUNK_FACTS = 3
"""How many `_full_chunks` gives."""


def _full_chunks(n: Size, rows: Size | int) -> tuple[Fact, ...]:
    """Whether there is one chunk before the last, a second, and, since each is made before the one before it goes and so two
    places take turns, a third for an even number of all.
    """
    return n > rows, n > 2 * rows, (n > 3 * rows) & (-(-n // rows) % 2 == 0)


def _rest(n: Size, rows: Size | int) -> Size:
    """The last chunk of n tokens."""
    return (n - 1) % rows + 1


def liger_rows(tokens: Size, *, hidden_size: int, vocab_size: int) -> Size:
    """Liger's tokens per chunk: a chunk has about as many logits as the input has elements; rounded up to a power of two."""
    per_chunk = ceil_div(vocab_size, hidden_size)
    chunk = -(-tokens // per_chunk)
    power = tokens * 0 + 1
    for i in range(MOST_DOUBLINGS):
        power = power + (chunk > 2**i) * 2**i
    return smaller(power, tokens)


def unsloth_rows(scored: Size, *, hidden_size: int, vocab_size: int, itemsize: int) -> Size:
    """Unsloth's tokens per chunk: the largest power of two up to n · h / v, within bounds."""
    fewest = min(max(_power_at_most(FEWEST_LOGITS // vocab_size), FEWEST_ROWS), MAX_ROWS)
    rows = larger(_power_at_most(scored * hidden_size // vocab_size), fewest)
    return larger(smaller(smaller(rows, min(MAX_ROWS, max(CHUNK_BYTES // (vocab_size * itemsize), 2))), scored), 1)


def _power_at_most(number: Size) -> Size:
    """The largest power of two up to a number; 1 for numbers below 1."""
    power = number * 0 + 1
    for i in range(MOST_DOUBLINGS):
        power = power + (number >= 2 ** (i + 1)) * 2**i
    return power
