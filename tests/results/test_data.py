"""Results are data: pickled, copied, compared, sent to another process, and asked there what they had not been asked before."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest

import peftplan
from peftplan.job.script import Script
from tests.planning.tiny import CONFIG

UNFIT: dict[str, Any] = {"method": "full", "batch_size": 8, "gpu": "0.05GiB", "context": 0}
ESTIMATES: dict[str, Callable[[], Any]] = {
    "qlora": lambda: peftplan.estimate("llama-2-70b", method="qlora", r=16),
    "on-cards": lambda: peftplan.estimate("llama-2-7b", method="qlora", gpu=["rtx-4090", "h100", "t4"]),
    "unfit": lambda: peftplan.estimate(CONFIG, **UNFIT),
    "searched": lambda: peftplan.estimate(CONFIG, **UNFIT, advice="all"),
    "kept-gradients": lambda: peftplan.estimate("gpt2", trainer="plain", keep_gradients=True, quant="int8"),
    "script": lambda: peftplan.estimate("gpt2", trainer="plain", script=Script(earlier_seq_lens=(64, 96), torch="2.10")),
    "adapter": lambda: peftplan.estimate("gpt2", peft_config={"peft_type": "IA3", "task_type": "CAUSAL_LM"}, gpu="t4"),
    "no-peak": lambda: peftplan.estimate("llama-3.1-8b", method="lora", quant="hqq", gpu="t4"),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "fit": lambda: peftplan.fit(CONFIG, gpu="0.25GiB", methods=["lora"]),
    "compare": lambda: peftplan.compare(CONFIG, methods=["lora", "full"], gpu="t4"),
    "serving": lambda: peftplan.serving(CONFIG, method="lora"),
    "inspection": lambda: peftplan.inspect(CONFIG, pattern="all-linear"),
    "models": peftplan.models,
    "gpus": peftplan.gpus,
}


def through(result: Any) -> Any:
    """What another process would be sent."""
    return pickle.loads(pickle.dumps(result))


def packages_in(pickled: bytes) -> set[str]:
    """The packages whose classes a pickle asks for."""
    named: set[str] = set()

    class Watching(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add(module.partition(".")[0])
            return super().find_class(module, name)

    Watching(io.BytesIO(pickled)).load()
    return named


def code_in(value: object, seen: set[int], path: str = "") -> Iterator[str]:
    """Where a value holds a function, a bound method or a partial."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))):
        return
    seen.add(id(value))
    if isinstance(value, (FunctionType, MethodType, partial)):
        yield f"{path}: {value}"
    members: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        members = iter([*value.items()])
    elif isinstance(value, (list, tuple, set, frozenset)):
        members = enumerate(value)
    for name, member in (*members, *vars(value).items()) if hasattr(value, "__dict__") else members:
        yield from code_in(member, seen, f"{path}.{name}")


@pytest.mark.parametrize("name", [*ESTIMATES, *OTHERS])
def test_a_result_is_data(name: str) -> None:
    compute = (ESTIMATES | OTHERS)[name]
    result = compute()
    assert [*code_in(result, set())] == []
    assert through(result) == result == copy.deepcopy(result) == compute()


@pytest.mark.parametrize("name", ESTIMATES)
def test_an_estimate_answers_the_same_on_the_other_side(name: str) -> None:
    """Sent before anything was asked of it, and after: peaks, verdicts, advice and lines are those of the one that stayed."""
    unasked, stayed = through(ESTIMATES[name]()), ESTIMATES[name]()
    assert unasked.to_dict() == stayed.to_dict()
    assert bool(stayed.advice) == (name in ("unfit", "searched"))
    assert peftplan.explain(unasked) == peftplan.explain(stayed) == peftplan.explain(through(stayed))
    assert peftplan.advice(unasked) == peftplan.advice(stayed) == stayed.advice == peftplan.advice(through(stayed))
    assert through(stayed).to_dict() == stayed.to_dict() == copy.deepcopy(stayed).to_dict()
    assert [*code_in(stayed, set())] == []
    if stayed.resizes:
        assert unasked.at(batch_size=3, seq_len=200).to_dict() == stayed.at(batch_size=3, seq_len=200).to_dict()


@pytest.mark.parametrize("name", ["on-cards", "unfit"])
def test_an_estimate_at_other_sizes_is_that_of_these_sizes(name: str) -> None:
    """Advice included: it counts from the sizes that were asked for."""
    options = {"on-cards": {"method": "qlora", "gpu": ["rtx-4090", "h100", "t4"]}, "unfit": UNFIT}
    resized = ESTIMATES[name]().at(batch_size=16, seq_len=500)
    model = CONFIG if name == "unfit" else "llama-2-7b"
    anew = peftplan.estimate(model, **{**options[name], "batch_size": 16, "seq_len": 500})
    assert resized.to_dict() == anew.to_dict()


def test_other_jobs_are_not_equal() -> None:
    assert peftplan.estimate("gpt2") != peftplan.estimate("gpt2", r=4)
    assert peftplan.estimate("gpt2").peaks != peftplan.estimate("gpt2", batch_size=2).peaks
    assert peftplan.estimate("gpt2", gpu="t4") != peftplan.estimate("gpt2", gpu="l4")


def test_a_grid_is_data() -> None:
    np = pytest.importorskip("numpy")
    estimate = peftplan.estimate("gpt2")
    grid = estimate.at(seq_len=np.array([100, 200]))
    assert through(grid) == grid == copy.deepcopy(grid) == through(estimate).at(seq_len=np.array([100, 200]))
    assert grid != estimate.at(seq_len=np.array([100, 201]))


ELSEWHERE = """
import json, pickle, sys
import peftplan
with open(sys.argv[1], "rb") as file:
    estimate = pickle.load(file)
print(json.dumps([estimate.to_dict(), estimate.at(batch_size=2).peaks.by_phase, peftplan.explain(estimate)]))
"""


def test_a_fresh_process_answers_the_same(tmp_path: Path) -> None:
    estimate = ESTIMATES["unfit"]()
    (tmp_path / "estimate.pickle").write_bytes(pickle.dumps(estimate))
    sent = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "estimate.pickle")]
    answered = json.loads(subprocess.run(sent, capture_output=True, text=True, check=True).stdout)
    expected = [estimate.to_dict(), estimate.at(batch_size=2).peaks.by_phase, peftplan.explain(estimate)]
    assert answered == json.loads(json.dumps(expected))


def test_objects_of_the_ecosystem_are_read_once() -> None:
    """A job made of peft's and transformers' objects holds what they say, so that it can be sent without them."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = peft.LoraConfig(r=4, target_modules={"q_proj", "v_proj"}, task_type="CAUSAL_LM")
    quant = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    args = transformers.TrainingArguments(output_dir="unused", per_device_train_batch_size=4, use_cpu=True, report_to=[])
    estimate = peftplan.estimate(
        CONFIG, peft_config=config, quantization_config=quant, training_args=args, gpu="0.02GiB", context=0
    )
    assert packages_in(pickle.dumps(estimate)).isdisjoint({"torch", "transformers", "peft", "numpy"})
    assert through(estimate).to_dict() == estimate.to_dict()
    assert estimate.advice


def test_a_traced_estimate_is_data() -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    estimate = peftplan.estimate(CONFIG, engine="trace", seq_len=64, gpu="0.02GiB", context=0, record=True)
    assert [*code_in(estimate, set())] == []
    assert through(estimate) == estimate == copy.deepcopy(estimate)
    assert through(estimate).to_dict() == estimate.to_dict()
    assert through(estimate).peaks.recording.series() == estimate.peaks.recording.series()
