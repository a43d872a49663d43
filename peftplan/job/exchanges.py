"""How experts that ranks divide were rehearsed with NeMo Automodel's recipe (tests/rehearse/automodel.jsonl)."""

from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from peftplan.arrays import Fact
from peftplan.job.kernels import OF_COMPILED_ATTENTION, kernels_of
from peftplan.job.loss_sizes import CUT_APART, NO_UPCAST

if TYPE_CHECKING:
    from peftplan.job.job import Job

Rows = Literal["few", "many", "most"]


class Exchanged(NamedTuple):
    """Experts that ranks divide, as they were rehearsed: kernels of the exchange and beside it, optimizers, whether layers are
    checkpoints, and whether several micro batches make a step."""

    kernels: tuple[str, ...]
    optims: tuple[str, ...]
    checkpoints: bool
    several: bool
    method: str = "full"
    syncs: bool = False
    """Whether each of several micro batches reduced its gradients."""
    shared: bool = False
    """Whether several ranks owned the same experts too."""
    stages: bool = False
    """Whether stages of a pipeline ran, each of which is no unit of FSDP2 itself."""
    whole: bool = False
    """Whether each of these stages is such a unit."""
    apart: bool = False
    """Whether the model without stages is no unit itself."""
    pretrains: bool = False
    """Whether weights were in fp32, and the loss read the head behind the model."""
    cuts: bool = False
    """Whether the loss read the head behind the model of weights in bf16 too."""
    frees: bool = False
    """Whether what is gathered was freed after forward, that of the experts too."""
    shares_rows: bool = False
    """Whether two ranks shared the rows of a batch."""
    rows: Rows = "many"
    """How many rows of experts: `few` get their weights, or biases, at once, and `most` of experts with biases run in chunks."""

    @property
    def loss(self) -> str:
        """The loss: of logits in fp32 but where tokens took experts in turn, or read behind the model."""
        return CUT_APART if self.pretrains or self.cuts else NO_UPCAST if IN_TURN in self.kernels else "full"


@cache
def alike(ranks: int, experts: int, k: int) -> bool:
    """Whether all of these ranks get as many tokens, which take k of the experts in turn."""
    owned, places = experts // ranks, [{(token * k + place) % experts for place in range(k)} for token in range(experts)]
    return len({sum(any(n // owned == rank for n in each) for each in places) for rank in range(ranks)}) == 1


def pads(job: "Job") -> Fact:
    """Whether the tool pads what each expert of a rank gets, to compute in 8 bits (transformer-engine 2.20.2,
    pytorch/module/fp8_padding.py)."""
    by_engine = kernels_of(job.setup.kernels or ()).experts
    if by_engine is None or by_engine.narrow is None or job.distributed is None:
        return False
    mlp = job.architecture.blocks[-1].mlp
    owned = mlp.num_experts // (job.distributed.ep_size or 1)
    return job.setup.rows * job.setup.seq_len * mlp.num_experts_per_tok % (owned * by_engine.narrow.rows) != 0


def fits_blocks(job: "Job") -> Fact:
    """Whether tokens can be cut into blocks that layers in 8 bits take: else Transformer Engine raises (csrc/quantizer.cpp,
    `MXFP8Quantizer::get_scale_shape`: "MXFP8 requires tensor dims that are divisible by 32"; pytorch/utils.py,
    `assert_dim_for_fp8_exec`: by 8 else, of which multiples of 16 were rehearsed)."""
    by_engine = kernels_of(job.setup.kernels or ()).experts
    if by_engine is None or by_engine.narrow is None:
        return True
    return job.setup.rows * job.setup.seq_len % by_engine.narrow.rows == 0


IN_TURN = "balanced.gate"
MOST_GATHERING = {False: 8, True: 64}
"""Ranks that gathered the tokens of all where these took experts in turn, without and in stages."""
ADAMW, ONE_BY_ONE = ("adamw_torch",), ("adam_one_by_one",)
ANY_ADAM = ("adamw_torch", "adam")
OF_NEMOTRON = ("mamba-ssm.scan", "deepep.exchange")
OF_DOCUMENTS = ("te.attention", "deepep.exchange", "te-linear.dense")
OF_HYBRID = ("te.attention", "hybridep.exchange", "te-linear.dense", "te-experts.experts")
OF_DEEP_IN_TURN = ("te-norm.rms_norm", "deepep.exchange", IN_TURN, "te-linear.dense")
OF_QUACK_IN_TURN = ("quack.rms_norm", "deepep.exchange", IN_TURN, "quack-linear.dense")
OF_HYBRID_IN_TURN = ("te-norm.rms_norm", "hybridep.exchange", IN_TURN, "te-linear.dense")
SCANNING_IN_TURN = ("te-norm.rms_norm", "mamba-ssm.scan", "hybridep.exchange", IN_TURN, "te-linear.dense")
OF_COMPILED_IN_TURN = ("torch-norm.rms_norm", OF_COMPILED_ATTENTION, "hybridep.exchange", IN_TURN, "te-experts.experts")
EXCHANGES: dict[str, tuple[Exchanged, ...]] = {
    "gemma4": tuple(Exchanged(("deepep.exchange",), ADAMW, False, False, method) for method in ("partial", "lora")),
    "qwen3_5_moe": (
        Exchanged(("deepep.exchange",), ADAMW, False, True, "partial"),
        Exchanged(("deepep.exchange",), ADAMW, True, True, "partial"),
        Exchanged(("deepep.exchange",), ADAMW, False, True, "lora"),
        Exchanged(("hybridep.exchange",), ADAMW, False, True, "partial", stages=True, whole=True),
    ),
    "qwen3_vl_moe": (
        Exchanged(("deepep.exchange", "te-linear.dense"), ADAMW, False, True, "partial"),
        Exchanged(("hybridep.exchange", "te-linear.dense"), ADAMW, False, True, "partial", shared=True, stages=True, whole=True),
    ),
    "minimax_m2": (
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True, stages=True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True, "lora", stages=True),
        Exchanged(("hybridep.exchange", "te-linear.dense"), ADAMW, True, True, shared=True, stages=True),
        Exchanged(("hybridep.exchange", "te-linear.dense"), ADAMW, False, True, stages=True),
        Exchanged(("hybridep.exchange",), ADAMW, False, True, "lora", apart=True),
    ),
    "ernie4_5_moe": (Exchanged(("deepep.exchange",), ADAMW, True, False),),
    "glm_moe_dsa": (
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True, shared=True, stages=True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True, "lora", stages=True),
        Exchanged(("hybridep.exchange", "te-linear.dense"), ADAMW, True, True, stages=True),
        Exchanged(("hybridep.exchange",), ADAMW, False, True, "lora", stages=True),
    ),
    "glm4_moe": (
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True, shared=True, stages=True, frees=True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, False, False, shared=True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True, "lora", stages=True),
        Exchanged((), (), False, False, shared=True),
        Exchanged((), ADAMW, False, True, syncs=True, stages=True),
    ),
    "glm4_moe_lite": (
        Exchanged(OF_DEEP_IN_TURN, ADAMW, True, True, apart=True),
        Exchanged(OF_DEEP_IN_TURN, ADAMW, True, True, "lora", apart=True),
        Exchanged(OF_DOCUMENTS, ONE_BY_ONE, False, False),
        Exchanged(("deepep.exchange", "te-linear.dense"), ADAMW, True, True, syncs=True, apart=True),
    ),
    "qwen3_moe": (
        Exchanged(OF_DEEP_IN_TURN, ADAMW, True, True, shared=True, stages=True),
        Exchanged(("torch-norm.rms_norm", IN_TURN), ADAMW, True, True),
        Exchanged(("te-norm.rms_norm", "deepep-again.exchange", IN_TURN, "te-linear.dense"), ADAMW, True, True),
        Exchanged(OF_DEEP_IN_TURN, ADAMW, True, True),
        Exchanged(OF_QUACK_IN_TURN, ADAMW, True, True),
        Exchanged(OF_DEEP_IN_TURN, ADAMW, False, True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True),
        Exchanged((*OF_HYBRID_IN_TURN, "te-experts.experts"), ONE_BY_ONE, True, True),
        Exchanged(OF_COMPILED_IN_TURN, ONE_BY_ONE, True, True),
        Exchanged((*OF_HYBRID_IN_TURN, "te-mxfp8.experts"), ONE_BY_ONE, True, True),
        Exchanged((*OF_DEEP_IN_TURN, "te-fp8-blocks.experts"), ONE_BY_ONE, False, True),
        Exchanged(("uccl.exchange", "te-linear.dense"), ADAMW, True, True, shared=True),
        Exchanged(("deepep.exchange",), ADAMW, True, True),
        Exchanged(("deepep.exchange", "te-linear.dense"), ("flash_adamw", "te_fused_adam"), True, True, cuts=True),
        Exchanged(("deepep.exchange", "te-linear.dense"), ("flash_adamw",), False, True, shares_rows=True),
        Exchanged(("deepep.exchange",), ADAMW, True, False, "lora"),
        Exchanged(OF_DOCUMENTS, ONE_BY_ONE, False, False, "lora"),
        Exchanged(OF_DOCUMENTS, ("flash_adamw",), True, False),
        Exchanged((*OF_DOCUMENTS, "te-experts.experts"), ONE_BY_ONE, True, False),
        Exchanged(OF_HYBRID, ONE_BY_ONE, True, False),
        Exchanged((*OF_HYBRID[:-1], "te-mxfp8.experts"), ONE_BY_ONE, True, False),
    ),
    "qwen3_next": (Exchanged(("hybridep.exchange",), ADAMW, True, True),),
    "deepseek_v3": (
        Exchanged(("torch-norm.rms_norm", IN_TURN), ADAMW, False, True),
        Exchanged(("torch-norm.rms_norm", IN_TURN), ADAMW, True, True, stages=True, whole=True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, False, True, shared=True, stages=True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True, shared=True, stages=True),
        Exchanged(OF_HYBRID_IN_TURN, ADAMW, True, True),
        Exchanged(OF_COMPILED_IN_TURN, ONE_BY_ONE, True, False),
        Exchanged(OF_COMPILED_IN_TURN[:-1], ADAMW, True, False),
        Exchanged((*OF_COMPILED_IN_TURN[:-1], "te-mxfp8.experts"), ONE_BY_ONE, True, False),
        Exchanged((*OF_HYBRID_IN_TURN, "te-mxfp8.experts"), ONE_BY_ONE, True, False),
        Exchanged(OF_DEEP_IN_TURN, ONE_BY_ONE, False, True),
        Exchanged((*OF_DEEP_IN_TURN, "te-experts.experts"), ONE_BY_ONE, False, True),
        Exchanged((*OF_DEEP_IN_TURN, "te-fp8.experts"), ONE_BY_ONE, False, True),
        Exchanged(OF_DEEP_IN_TURN, ADAMW, True, True, stages=True, whole=True),
        Exchanged(OF_DEEP_IN_TURN, ADAMW, True, True),
        Exchanged(("deepep.exchange", "te-linear.dense", "te-experts.experts"), ONE_BY_ONE, False, True),
        Exchanged(OF_DOCUMENTS, ADAMW, False, False),
        Exchanged(("te-norm.rms_norm", "deepep.exchange", "te-linear.dense"), ("flash_adamw", "te_fused_adam"), True, True),
        Exchanged(("te-norm.rms_norm", "deepep.exchange", "te-linear.dense"), ("flash_adamw",), True, True, shares_rows=True),
        Exchanged((), ADAMW, False, True, pretrains=True),
        Exchanged((), ADAMW, False, True, stages=True, whole=True),
    ),
    "nemotron_h": (
        Exchanged(("te-norm.rms_norm", *OF_NEMOTRON, IN_TURN, "te-linear.dense"), ADAMW, True, True),
        *(
            Exchanged(SCANNING_IN_TURN, ADAMW, True, True, method, frees=frees)
            for method, frees in (("full", False), ("full", True), ("lora", True))
        ),
        Exchanged((*OF_NEMOTRON, "te-linear.dense"), ANY_ADAM, False, False),
        Exchanged((*OF_NEMOTRON, "te-linear.dense"), ADAMW, False, True, syncs=True),
        Exchanged((*OF_NEMOTRON, "te-linear.dense"), ANY_ADAM, False, True, "lora", shared=True),
        Exchanged(("te-norm.rms_norm", *OF_NEMOTRON, "te-linear.dense"), ANY_ADAM, False, False, "lora"),
        Exchanged(("te.attention", *OF_NEMOTRON, "te-linear.dense"), ANY_ADAM, False, True, "lora"),
        Exchanged(OF_NEMOTRON, ANY_ADAM, False, True, "lora", shared=True),
    ),
    "gpt_oss": (
        Exchanged(("deepep.exchange", "te-linear.dense"), ANY_ADAM, False, False, rows="few"),
        Exchanged(("deepep.exchange", "te-linear.dense"), ANY_ADAM, False, False, rows="most"),
        Exchanged(("hybridep.exchange", "te-linear.dense"), ANY_ADAM, False, False, rows="most"),
        Exchanged(("te-norm.rms_norm", *OF_DOCUMENTS, "te-experts.experts"), ONE_BY_ONE, False, True, rows="few"),
        Exchanged(("te-norm.rms_norm", "deepep.exchange", "te-linear.dense"), ("flash_adamw", "te_fused_adam"), False, True),
        Exchanged(OF_HYBRID_IN_TURN, ANY_ADAM, False, True),
        Exchanged((*OF_HYBRID_IN_TURN, "te-experts.experts"), ANY_ADAM, False, True, shared=True),
        Exchanged((*OF_HYBRID_IN_TURN, "te-mxfp8.experts"), ONE_BY_ONE, True, True, shared=True),
        Exchanged((), ADAMW, False, True),
        Exchanged((), ADAMW, False, True, "lora"),
    ),
}
"""Model types whose experts ranks divide → how they were rehearsed."""
WORST: dict[str, tuple[tuple[str, ...], ...]] = {
    "glm4_moe": ((),),
    "qwen3_moe": (
        ("uccl.exchange", "te-linear.dense"),
        ("deepep.exchange",),
        ("te.attention", "deepep.exchange", "te-linear.dense"),
    ),
}
"""Model type → kernels beside which every token was sent to one rank (tests/rehearse/worst_routing.jsonl)."""
