"""All that is alive at each phase's peak, tensor by tensor: the formulas against a trace, which shares no code with them.

Two peaks can be equal where two wrongs cancel; two ledgers cannot. What lasts is compared by name and bytes, what passes by
category and bytes: a trace names it by the module that ran, the formulas by the operation. Where something passes at the peak of
loading, the formulas have one line for it beside all that lasts, so that the bytes of the whole are compared.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan import estimate
from peftplan.ledger import Ledger
from tests.memory.families import MODELS, B, R, S
from tests.memory.test_kept import differences, module_name

LINEAR: dict[str, Any] = {"r": R, "target_modules": "all-linear"}
PLAIN: dict[str, Any] = {"trainer": "plain"}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama full plain": ("llama", {"method": "full", **PLAIN}),
    "llama qlora": ("llama", {"method": "qlora", **LINEAR}),
    "llama dora plain": ("llama", {"method": "dora", **PLAIN, **LINEAR}),
    "llama prefix": ("llama", {"method": "prefix-tuning", "num_virtual_tokens": 7, **PLAIN}),
    "qwen3 lora trl": ("qwen3", {"method": "lora", "trainer": "trl", **LINEAR}),
    "qwen3 vera plain": ("qwen3", {"method": "vera", **PLAIN, **LINEAR}),
    "qwen3 full adagrad": ("qwen3", {"method": "full", "optim": "adagrad", **PLAIN}),
    "gemma qlora trl": ("gemma", {"method": "qlora", "trainer": "trl", **LINEAR}),
    "gemma ia3 kept logits": ("gemma", {"method": "ia3", "logits_to_keep": 8}),
    "gpt2 lora rmsprop": ("gpt2", {"method": "lora", "optim": "rmsprop", **PLAIN, **LINEAR}),
    "gpt2 full eager": ("gpt2", {"method": "full", "attn_implementation": "eager"}),
    "mixtral lora plain": ("mixtral", {"method": "lora", **PLAIN, **LINEAR}),
    "mixtral full unchecked": ("mixtral", {"method": "full", "gradient_checkpointing": False}),
    "bert lora": ("bert", {"method": "lora", "gradient_checkpointing": False, **LINEAR}),
    "bert bitfit": ("bert", {"method": "bitfit"}),
    "t5 lora plain": ("t5", {"method": "lora", **PLAIN, **LINEAR}),
    "t5 full": ("t5", {"method": "full"}),
}
ENGINES: tuple[Any, ...] = ("analytic", "trace")
PHASES = ("load", "forward", "backward", "step")
PASSING = ("activations", "logits", "temporaries")
NAMED = ("weights", "quant_state", "adapter_weights", "gradients")
"""Categories whose lines both engines name after the parameter."""
Key = tuple[str, str, int]


def alive(ledger: Ledger) -> Counter[Key]:
    """Category, name of a parameter, and bytes of one tensor → how many, without the tails of blocks.

    Left out: single numbers, such as the loss and the norms of gradients, and lists of whole numbers, such as positions and
    moved labels, which only a trace has.
    """
    tensors: Counter[Key] = Counter()
    for line in ledger:
        tails, number = line.name == "tails of unsplit blocks", line.shape == ()
        passing = line.category in PASSING and (line.dtype == "int64" or number)
        if line.place == "device" and line.copies and not tails and not passing:
            name = module_name(line.name).removeprefix("model.") if line.category in NAMED else ""
            tensors[line.category, name, line.bytes() // line.copies] += line.copies
    return tensors


def total(tensors: Counter[Key]) -> int:
    """Bytes of all of them."""
    return sum(nbytes * count for (_, _, nbytes), count in tensors.items())


@pytest.mark.parametrize("name", JOBS)
def test_what_is_alive_at_each_peak_is_what_a_trace_has(name: str) -> None:
    family, options = JOBS[name]
    ours, theirs = (estimate(MODELS[family][0], engine=engine, batch_size=B, seq_len=S, **options).peaks for engine in ENGINES)
    assert ours is not None
    assert theirs is not None
    for phase in PHASES:
        of_ours, of_theirs = alive(ours.ledgers[phase]), alive(theirs.ledgers[phase])
        assert sum(of_theirs.values()) > 20
        if phase == "load" and any(category == "temporaries" for category, _, _ in of_theirs):
            assert total(of_ours) == total(of_theirs)  # the formulas sum up what passes while weights are loaded
        else:
            assert of_ours == of_theirs, f"{phase}\n{differences(of_ours, of_theirs)}"
