"""How experts that ranks divide were rehearsed with NeMo Automodel's recipe (tests/rehearse/automodel.jsonl)."""

from typing import NamedTuple


class Exchanged(NamedTuple):
    """Experts that ranks divide, as they were rehearsed: kernels of the exchange and beside it, the optimizer, whether layers are
    checkpoints, whether several micro batches make a step, and the method."""

    kernels: tuple[str, ...]
    optim: str
    checkpoints: bool
    several: bool
    method: str = "full"


OF_DOCUMENTS = ("te.attention", "deepep.exchange", "te-linear.dense")
EXCHANGES: dict[str, tuple[Exchanged, ...]] = {
    "glm4_moe": (Exchanged((), "adamw_torch", False, False),),
    "glm4_moe_lite": (Exchanged(OF_DOCUMENTS, "adam_one_by_one", False, False),),
    "qwen3_moe": (
        Exchanged(("uccl.exchange", "te-linear.dense"), "adamw_torch", True, True),
        Exchanged(("deepep.exchange",), "adamw_torch", True, True),
        Exchanged((*OF_DOCUMENTS, "te-experts.experts"), "adam_one_by_one", True, False),
    ),
    "deepseek_v3": (Exchanged(("deepep.exchange", "te-linear.dense", "te-experts.experts"), "adam_one_by_one", False, True),),
}
"""Model types whose experts ranks divide → how they were rehearsed."""
