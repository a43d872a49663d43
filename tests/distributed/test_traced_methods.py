"""Methods and optimizers over several GPUs: formulas against kept traces (`python -m tools.traced_methods`) and rehearsals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from tools.rehearsed_jobs import drifts, read
from tools.traced_methods import kept, peaks

TRACED = kept()
KEPT = Path(__file__).parents[1] / "rehearse"
REHEARSED = read(KEPT / "optimizers.jsonl")
METHODS = read(KEPT / "methods.jsonl")
SIZES: dict[str, Any] = {"gpus": 4, "seq_len": 256, "batch_size": 2}
REFUSED = (
    *((method, "fsdp1", "uniform dtype") for method in ("loha", "lokr", "ia3", "vera", "boft", "adalora", "fourierft")),
    *((method, "fsdp1", "of adapter_down in fp32") for method in ("houlsby", "pfeiffer")),
    ("dora", "fsdp1", "tuners/lora/dora.py:97"),
    ("lora-fa", "fsdp1", "uniform dtype"),
    ("lora-fa", "fsdp2", "optimizers/lorafa.py:165"),
    ("adalora", "fsdp2", "tuners/adalora/model.py:251"),
    *(("qia3", strategy, "tuners/ia3/bnb.py") for strategy in ("fsdp2", "zero2", "zero3")),
    ("ln-tuning", "zero3", "runtime/zero/utils.py:218"),
    *(("vera", strategy, "tuners/vera/layer.py:285") for strategy in ("fsdp2", "zero1", "zero2")),
)
"""Method, strategy, part of the error that two ranks of gloo raised (FSDP1 and FSDP2), or a rehearsal (ZeRO-2)."""


def called(row: dict[str, Any]) -> str:
    return " ".join(str(value) for name, value in row.items() if name != "traced")


@pytest.mark.parametrize("row", TRACED, ids=map(called, TRACED))
def test_a_traced_job(row: dict[str, Any]) -> None:
    """A step on the host leaves little on the card: scalars of 0.2 MB are missing there. Of prompt tuning under FSDP1 a segment
    of 2 MiB is, which a rehearsal has as well."""
    estimated = peaks({name: value for name, value in row.items() if name != "traced"}, "analytic")
    assert estimated is not None
    for phase, traced in row["traced"]["by_phase"].items():
        rel = 2e-2 if phase == "step" and "offload_params" in row else 1e-3
        assert estimated["by_phase"][phase] == pytest.approx(traced, rel=rel), phase
    assert estimated["reserved"] == pytest.approx(row["traced"]["reserved"], rel=1e-3, abs=2**21)


TIMED = ("torch_4bit", "torch_8bit")
WITHIN = {"load": 0.0013, "forward": 0.002, "backward": 0.002, "step": 0.15, "allocated": 0.1, "reserved": 0}
"""Percent that a formula may be apart. A row says under `within` where it is further apart: null is not compared, and of reserved
bytes not stated."""


def assert_within(row: dict[str, Any], limits: dict[str, float], *, of_first: bool = False) -> None:
    """`of_first`: the peak is that of the first step, which holds more than later ones."""
    drift = drifts(row, "analytic")
    assert drift is not None
    limits = {**limits, **row.get("within", {})}
    assert ("reserved" in drift) != (limits["reserved"] is None)
    for what in drift.keys() & limits.keys():
        if (limit := limits[what]) is not None:
            assert (drift[what] if of_first and what == "allocated" else abs(drift[what])) <= limit, (what, drift[what])


@pytest.mark.parametrize("row", REHEARSED, ids=[row["job"] for row in REHEARSED])
def test_a_rehearsed_job(row: dict[str, Any]) -> None:
    """Optimizers over a rank's shards, and on one GPU. An adapter is whole before ZeRO-3 divides it, which decides the load of
    LoRA with r 64; of QLoRA a tail of 0.5 MB is left there, below the peak. Adagrad's states of a whole adapter stay. Under
    FSDP1 a tail of a block is left. In the first step a paged optimizer takes 1 MB more, and APOLLO makes the states of one
    parameter after the step of another, which leaves other tails of blocks. LOMO takes no step. torchao's first step holds more
    than later ones: it times its kernels. No step ends LOMO's rehearsal, so in full under FSDP it has gathered weights for the
    checkpoint after the last one, which counts as a forward: SGD's under FSDP2, which ends a step before, reserves what the
    formula says. Reserved bytes are not stated of torchao's AdamW over whole matrices, of Adagrad beside whole weights in unequal
    parts, and of masters on the card of shards that are on the host. AdaLomo's with QLoRA are 14.8 % apart by the checkpoint
    after the last backward, where that of forward is equal. Other phases are apart by tails of blocks of 1 to 2 MB in models of
    0.1 to 0.3 GB, where the copies of a timed kernel lay, or by Adagrad's of three unequal parts."""
    assert_within(row, WITHIN, of_first=any(name in row["job"] for name in TIMED))
    assert ("lomo" in row["job"]) == ("step" not in row["by_phase"])


@pytest.mark.parametrize("row", METHODS, ids=[row["job"] for row in METHODS])
def test_a_rehearsed_method(row: dict[str, Any]) -> None:
    """AdaLoRA's formula leaves out one output that its layers keep (`memory/methods/adalora.py`); VeRA's is 0.03 % high, BOFT's
    has other tails of blocks. Under ZeRO-3 small parameters are gathered in another order: reserved is up to 0.35 % too low, of
    DoRA's job with r 32 6 MB too high."""
    assert_within(row, {"forward": 0.003, "backward": 0.003, "step": 0.082, "allocated": 0.003, "reserved": 0.075})


@pytest.mark.parametrize(("method", "strategy", "why"), REFUSED)
def test_a_method_that_raises(method: str, strategy: str, why: str) -> None:
    over: dict[str, Any] = {"method": "ia3", "quant": "nf4"} if method == "qia3" else {"method": method}
    with pytest.raises(RefusedError, match=why):
        peftplan.estimate("qwen2.5-0.5b", strategy=strategy, **over, **SIZES)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"strategy": "fsdp1", "quant_storage": "bf16", "kbit_prepare": True}, "_flat_param.py:813"),
        ({"strategy": "fsdp1", "quant_storage": "fp32", "kbit_prepare": False}, "_flat_param.py:813"),
        ({"strategy": "fsdp2", "method": "lora", "quant": "int8"}, "modules.py:1182"),
        ({"strategy": "fsdp2", "method": "qdora", "trainer": "trl"}, "_fsdp_param_group.py:283"),
        ({"strategy": "ddp", "static_graph": True, "gradient_accumulation_steps": 2}, "reducer.cpp:1732"),
        ({"strategy": "zero2", "offload_optimizer": "cpu", "optim": "adagrad"}, "engine.py:2346"),
    ],
    ids=str,
)
def test_options_that_raise(options: dict[str, Any], why: str) -> None:
    """DDP's assertion came from two ranks of gloo."""
    with pytest.raises(RefusedError, match=why):
        peftplan.estimate("qwen2.5-0.5b", **{"method": "qlora", **options}, **SIZES)


def test_the_host_steps_with_an_optimizer_of_deepspeed() -> None:
    """accelerate replaces any: no byte of the card depends on it, and the host holds Adam's two moments, or Lion's one."""
    job: dict[str, Any] = {"method": "full", "strategy": "zero2", "offload_optimizer": "cpu", **SIZES}
    adam, eight_bits, lion = (
        peftplan.estimate("qwen2.5-0.5b", **job, **({"optim": optim} if optim else {}))
        for optim in (None, "adamw_8bit", "lion_32bit")
    )
    assert adam.peaks == eight_bits.peaks
    assert adam.distributed is not None
    assert lion.distributed is not None
    assert "not adamw_8bit" in " ".join(eight_bits.warnings)
    trained, world = 494_032_768, 4
    assert adam.distributed.host_bytes - lion.distributed.host_bytes == pytest.approx(4 * trained / world, rel=1e-6)
    kept = peftplan.estimate("qwen2.5-0.5b", **job, optim="adamw_8bit", zero_force_ds_cpu_optimizer=False)
    assert kept.peaks is None


def test_packed_weights_decide_what_fsdp1_gathers() -> None:
    """Rehearsed by Trainer over 4 GPUs, without autocast, beside an adapter in fp32: the first LoRA module raises RuntimeError,
    since its weight is gathered in bf16 and its input is cast to fp32. All in bf16, or autocast, leave one dtype."""
    options: dict[str, Any] = {"method": "qlora", "strategy": "fsdp1", "quant_storage": "bf16", **SIZES}
    with pytest.raises(RefusedError, match="accepted: --autocast bf16, or --adapter-dtype bf16"):
        peftplan.estimate("qwen2.5-0.5b", autocast="none", **options)
    for others in ({}, {"autocast": "none", "adapter_dtype": "bf16"}):
        assert peftplan.estimate("qwen2.5-0.5b", **options, **others).peaks is not None
    own_loop = peftplan.estimate("qwen2.5-0.5b", autocast="none", trainer="plain", **options)  # gathers each in its dtype
    assert own_loop.peaks is None


@pytest.mark.parametrize(
    "options", [{"target_modules": ("q_proj", "embed_tokens")}, {"trainable_token_indices": (1, 2)}], ids=str
)
def test_lora_of_an_embedding_under_fsdp1(options: dict[str, Any]) -> None:
    """Its tensors lie in a ParameterDict of the root's unit: two ranks of gloo raise ValueError."""
    with pytest.raises(RefusedError, match="uniform dtype"):
        peftplan.estimate("qwen2.5-0.5b", method="lora", strategy="fsdp1", **options, **SIZES)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"use_reentrant": True}, False),
        ({"offload_params": "cpu"}, False),
        ({"use_orig_params": False}, False),
        ({"dtype": "fp16"}, False),
        ({"bias": "all"}, False),
        ({"method": "lora", "quant": "nf4"}, False),
    ],
    ids=str,
)
def test_four_bits_in_fp32_under_fsdp1_were_rehearsed_so(options: dict[str, Any], *, known: bool) -> None:
    job: dict[str, Any] = {"method": "qlora", "quant_storage": "fp32", "strategy": "fsdp1", "gradient_checkpointing": True}
    assert (peftplan.estimate("llama-3.2-1b", **{**job, **options}, **SIZES).peaks is not None) is known


@pytest.mark.parametrize(
    ("options", "known"), [({}, True), ({"quant_storage": "uint8"}, False), ({"trainer": "trl"}, False)], ids=str
)
def test_boft_over_four_bits_was_rehearsed_so(options: dict[str, Any], *, known: bool) -> None:
    job: dict[str, Any] = {"method": "boft", "quant": "nf4", "quant_storage": "bf16", "strategy": "fsdp2"}
    assert (peftplan.estimate("qwen2.5-0.5b", **{**job, **options}, **SIZES).peaks is not None) is known
