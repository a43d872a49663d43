"""What compiled jobs are kept by: a job that differs in one thing is compiled again, one of other sizes is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import peftplan
from peftplan.analytic import compiled as room
from peftplan.job.inventory import Inventory, inventory
from peftplan.job.job import Job
from peftplan.job.prepare import prepare
from peftplan.job.script import Script
from peftplan.job.setup import Setup
from peftplan.job.sources import load_config
from peftplan.storage import parse_quant
from tools.rank_grid import cut

JOB = prepare("gemma-2-2b", method="lora", seq_len=512)
FIELDS = [name for name in Setup.model_fields if name not in ("batch_size", "seq_len")]
READ = {"dtype": "fp32", "logits_to_keep": 64, "trainer": "trl", "kernels": ("liger.rope",)}
"""Fields whose value is looked up or enters the sizes; of the others any value will do."""


def at(**fields: Any) -> Job:
    """The job with fields of its setup replaced, unchecked."""
    return JOB._replace(setup=JOB.setup.model_copy(update=fields))


OTHERS: dict[str, Job] = {
    **{name: at(**{name: READ.get(name, "another")}) for name in FIELDS},
    "method": JOB._replace(method=JOB.method and JOB.method._replace(name="another")),
    "an option of the method": JOB._replace(config=JOB.config and JOB.config.model_copy(update={"r": 9})),
    "quant": JOB._replace(quant=parse_quant("int8")),
    "an option of quant": JOB._replace(quant=parse_quant("nf4", double_quant=True, compute_dtype="bf16")),
    "script": JOB._replace(request=JOB.request._replace(script=Script(empties_cache=True))),
    "GPUs": JOB._replace(distributed=prepare("gemma-2-2b", method="lora", seq_len=512, gpus=2).distributed),
    "architecture": JOB._replace(architecture=replace(JOB.architecture)),
    "the config of a second model": JOB._replace(second_config="{}"),
    "more than one sequence": at(batch_size=2),
    "a ragged mask": at(seq_len=500),
    "more than a window": at(seq_len=5000),
}


@pytest.fixture(params=[False])
def compile_again(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether a job is compiled, where `JOB` was just before. The parameter: whether the card's multiprocessors decide it."""
    by_processors: bool = request.param
    compiled: list[Job] = []
    monkeypatch.setattr(room, "COMPILED", type(room.COMPILED)())
    monkeypatch.setattr(room, "check", lambda job: None)

    def compile_job(of: Inventory, *_: object, **__: object) -> SimpleNamespace:
        compiled.append(of.job)
        return SimpleNamespace(by_processors=by_processors)

    monkeypatch.setattr(room, "compile_job", compile_job)

    of_base = inventory(JOB)

    def again(job: Job, compute_capability: str = "8.0", *, late: bool = False, holding: Any = None) -> bool:
        room.compiled(of_base, compute_capability="8.0")
        before = len(compiled)
        room.compiled(of_base._replace(job=job, holding=holding), compute_capability=compute_capability, late=late)
        return len(compiled) > before

    return again


@pytest.mark.parametrize("what", OTHERS)
def test_what_decides_a_step_is_compiled_again(what: str, compile_again: Callable[..., bool]) -> None:
    assert compile_again(OTHERS[what])


def test_another_card_is_compiled_again(compile_again: Callable[..., bool]) -> None:
    assert compile_again(JOB, "9.0")
    assert not compile_again(JOB, "8.0")


@pytest.mark.parametrize("compile_again", [False, True], indirect=True)
def test_a_card_of_other_multiprocessors_is_where_these_decide(
    request: pytest.FixtureRequest, compile_again: Callable[..., bool]
) -> None:
    assert compile_again(JOB.on_card(58)) == request.node.callspec.params["compile_again"]


def test_a_gpu_that_is_late_is_compiled_again(compile_again: Callable[..., bool]) -> None:
    assert compile_again(JOB, late=True)


def test_another_device_of_a_device_map_is_compiled_again(compile_again: Callable[..., bool]) -> None:
    assert compile_again(JOB, holding=SimpleNamespace(device=1, rank=None))


def test_another_rank_is_compiled_again(compile_again: Callable[..., bool]) -> None:
    assert compile_again(JOB, holding=SimpleNamespace(device=None, rank=1))


@pytest.mark.parametrize("sizes", [{"seq_len": 1024}, {"seq_len": 8}])
def test_other_sizes_of_the_same_operations_are_not(sizes: dict[str, int], compile_again: Callable[..., bool]) -> None:
    assert not compile_again(at(**sizes))


def test_a_config_that_is_read_again_is_not_compiled_again() -> None:
    """What a job reads of its config beside the architecture is not in the key, so all of the config is compared."""
    config = load_config("gemma-2-2b")
    first, again, other = (prepare(read, method="lora") for read in (config, {**config}, {**config, "bos_token_id": 7}))
    assert first.architecture is again.architecture
    assert first.architecture == other.architecture
    assert first.architecture is not other.architecture


def test_a_teacher_whose_file_changed_is_read_again(tmp_path: Path) -> None:
    """Four layers more of Qwen2.5 0.5B, of 14,912,384 parameters each, in 16 bits; of each layer two norms and three biases end
    256 bytes before a block of 512 does."""
    config = load_config("qwen2.5-0.5b")
    options: dict[str, Any] = {"method": "lora", "seq_len": 256, "trainer": "trl-gkd", "teacher_model": str(tmp_path)}
    memory = []
    for layers in (4, 8):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        memory.append(peftplan.estimate("qwen2.5-0.5b", **options).to_dict()["memory"])
    assert memory[1]["persistent"] - memory[0]["persistent"] == 4 * (2 * 14_912_384 + 5 * 256)
    assert memory[1]["peak_allocated"] - memory[0]["peak_allocated"] == pytest.approx(4 * 2 * 14_912_384, rel=0.02)


def test_rows_longer_than_what_an_indexer_chooses_are_compiled_apart() -> None:
    """Of GLM-5: up to 2,048 tokens every key is chosen, and top-k is as long as the row."""
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "ep_size": 4, "pp_size": 2}
    job |= {"pp_schedule": "interleaved1f1b", "pp_stage_is_unit": False, "gradient_checkpointing": True, "optim": "adamw_torch"}
    job |= {"kernels": "te-norm,hybridep,te-linear,balanced", "loss": "full-no-upcast"}

    def allocated(seq_len: int) -> int:
        peaks = peftplan.estimate(cut("glm-5", 5), **job, seq_len=seq_len).peaks
        assert peaks is not None
        return peaks.allocated

    lengths, alone = (512, 1024, 4096), []
    for seq_len in lengths:
        room.COMPILED.clear()
        alone.append(allocated(seq_len))
    for seq_lens in (lengths, lengths[::-1]):
        room.COMPILED.clear()
        together = {seq_len: allocated(seq_len) for seq_len in seq_lens}
        assert [together[seq_len] for seq_len in lengths] == alone


def test_fewer_tokens_than_were_rehearsed_find_no_compiled_job() -> None:
    """Of Nemotron 3 in full fine-tuning, which predicts further tokens."""
    job: dict[str, Any] = {"method": "full", "trainer": "automodel", "strategy": "fsdp2", "gpus": 8, "ep_size": 8}
    model = cut("nvidia-nemotron-3-super-120b-a12b-bf16", "MEM*EM")
    for seq_len, known in ((2048, True), (1024, False), (2048, True)):
        result = peftplan.estimate(model, **job, kernels="mamba-ssm,deepep,te-linear", seq_len=seq_len)
        assert (result.peaks is not None) is known
