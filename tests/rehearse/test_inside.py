"""What a program reads on the emulated card: small programs that say what they see."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from peftplan.rehearse import rehearse

pytestmark = pytest.mark.rehearse

SEEN = """
import ctypes, json, torch
pynvml = ctypes.CDLL("libnvidia-ml.so.1")
count, name, handle = ctypes.c_uint(), ctypes.create_string_buffer(96), ctypes.c_void_p()
class Memory(ctypes.Structure):
    _fields_ = [(field, ctypes.c_ulonglong) for field in ("total", "free", "used")]
memory = Memory()
pynvml.nvmlInit_v2()
pynvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
pynvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
pynvml.nvmlDeviceGetName(handle, name, 96)
x = torch.ones(256, 1024, 1024, device="cuda")
pynvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
free, total = torch.cuda.mem_get_info()
mask = x[0, 0] > 0
print("SEEN", json.dumps({
    "cards": [count.value, torch.cuda.device_count()],
    "name": name.value.decode(),
    "used": [memory.used, total - free],
    "reserved": torch.cuda.memory_reserved(),
    "pinned": [torch.zeros(9, pin_memory=True).is_pinned(), torch.zeros(9).is_pinned()],
    "conditions": [bool((x > 0).all()), bool((x < 0).any()), bool(torch.isnan(x).any()), bool(torch.isfinite(x).all())],
    "overflow": (x.sum() == 0).byte().item(),
    "listed": torch.tensor([torch.tensor(3, device="cuda"), torch.tensor(4)], device="cuda").tolist(),
    "counted": len(torch.arange(torch.tensor([2, 3]).cuda().sum(), device="cuda")),
    "filled": torch.zeros(3, dtype=torch.int64).cuda().index_fill(0, torch.tensor([1]).cuda(), 7).tolist(),
    "checked": torch._check_tensor_all(x[0, 0] == x[0, 1]) is None,
    "mask": [all(mask.cpu().tolist()), all(mask.tolist()), any(torch.isnan(x[0, 0]).tolist())],
}))
"""
NAMES = """
import json, pickle, torch
from torch.nn.functional import one_hot
renamed = [torch.mean, torch.Tensor.sum, torch.tensor, torch.isnan, torch.topk, one_hot, torch.Tensor.item]
print("SEEN", json.dumps([[each.__name__, pickle.loads(pickle.dumps(each)) is each] for each in renamed]))
"""
GENERATING = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 256}
model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=2)).cuda()
prompt = torch.ones(3, 5, dtype=torch.int64, device="cuda")
print("SEEN", json.dumps([list(model.generate(prompt, do_sample=sample, max_new_tokens=17).shape) for sample in (True, False)]))
"""

MAKING = """
import json, torch
with torch.device("cuda"):
    numbers = torch.tensor([number / 2 for number in torch.arange(3).float()])
    print("SEEN", json.dumps([torch.ones(2).device.type, numbers.device.type, list(numbers.shape)]))
"""

GUARDED = """
import json, torch
rows = torch.randn(4, 3000, device="cuda")
loss, nan = rows.sum(), torch.isnan(rows)
print("SEEN", json.dumps([
    bool(torch.isfinite(loss)), bool(~torch.isfinite(loss)), bool(torch.logical_not(torch.isfinite(rows)).any()),
    nan.sum().item(), nan.float().mean().item(), nan.all().item(), (~nan).all().item(), int(nan.cpu().sum()),
    list(rows[nan].shape), list(rows[~nan].shape), type(nan).__name__,
]))
"""
SAMPLING = """
import json, torch
logits = torch.randn(2, 151936, device="cuda")
print("SEEN", json.dumps(list(logits.topk(50).values.shape)))
"""
CAPTURED = """
import json, torch
layer, rows = torch.nn.Linear(1024, 1024).cuda(), torch.zeros(1 << 14, 1024, device="cuda")
layer(rows)
torch.cuda.empty_cache()
reserved = [torch.cuda.memory_reserved()]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = layer(rows)
capturing = torch.cuda.is_current_stream_capturing()
graph.replay()
del result
torch.cuda.empty_cache()
reserved.append(torch.cuda.memory_reserved())
del graph
torch.cuda.empty_cache()
reserved.append(torch.cuda.memory_reserved())
print("SEEN", json.dumps([capturing, [size - reserved[0] >> 20 for size in reserved]]))
"""
SAVING = """
import json, os, torch
saved = {"step": torch.tensor([7, 8]), "random": torch.get_rng_state(), "card": torch.ones(1 << 20, device="cuda"),
    "host": torch.ones(1 << 20)}
torch.save(saved, "state.pt")
read = torch.load("state.pt", map_location="cpu")
torch.set_rng_state(read["random"])
print("SEEN", json.dumps([read["step"].tolist(), [list(read[name].shape) for name in ("card", "host")],
    os.stat("state.pt").st_size >> 20, os.stat("state.pt").st_blocks * 512 >> 20]))
"""

TO_OBJECTS = """
import io, json, torch
saved = {"card": torch.ones(1 << 20, device="cuda"), "host": torch.ones(1 << 20), "step": torch.tensor([7, 8])}
memory = io.BytesIO()
torch.save(saved, memory)
memory.seek(0)
with open("state.pt", "wb") as file:
    torch.save(saved, file)
read = [torch.load(place, map_location="cpu") for place in (memory, "state.pt")]
print("SEEN", json.dumps([[each["card"].shape[0], each["host"].shape[0], each["step"].tolist()] for each in read]))
"""


def seen(program: str, gpu: str, tmp_path: Path, **environment: str) -> Any:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    path, output = tmp_path / "program.py", tmp_path / "output"
    path.write_text(program, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, output.open("w") as file:
        for name, value in environment.items():
            patch.setenv(name, value)
        rehearse([sys.executable, str(path)], gpu=gpu, stdout=file.fileno())
    return json.loads(next(line for line in output.read_text().splitlines() if line.startswith("SEEN"))[len("SEEN") :])


@pytest.mark.parametrize("segments", ["expandable_segments:True", "expandable_segments:False"])
def test_the_card_says_what_it_is_and_holds(segments: str, tmp_path: Path) -> None:
    shown = seen(SEEN, "2xrtx-4090", tmp_path, PYTORCH_CUDA_ALLOC_CONF=segments)
    assert shown["cards"] == [2, 2]
    assert "4090" in shown["name"]
    assert shown["used"][0] == shown["used"][1] > shown["reserved"] >= 2**30
    assert shown["pinned"] == [True, False]


def test_segments_grow_on_a_card_that_could_be_in_a_fabric(tmp_path: Path) -> None:
    """torch asks NVML where the card is Hopper; with pynvml installed, all its functions are there.

    A segment grows by pages of 20 MiB (`CUDACachingAllocator.cpp`, `kLargeBuffer`), of which 1 GiB takes 52.
    """
    pytest.importorskip("pynvml")
    program = 'import torch\nx = torch.ones(1 << 28, device="cuda")\nprint("SEEN", torch.cuda.memory_reserved())\n'
    assert seen(program, "h100-80gb", tmp_path, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True") == 52 * 20 * 2**20


def test_conditions_read_from_the_card_are_sane(tmp_path: Path) -> None:
    shown = seen(SEEN, "rtx-4090", tmp_path)
    assert shown["conditions"] == [True, False, False, True]
    assert shown["overflow"] == 0
    assert shown["checked"]
    assert shown["listed"] == [3, 4]
    assert shown["counted"] == 5
    assert shown["filled"] == [0, 7, 0]
    assert shown["mask"] == [True, True, False]


def test_guards_against_nan_find_none(tmp_path: Path) -> None:
    """Also where they count, invert or copy what `isnan` and `isfinite` found."""
    assert seen(GUARDED, "rtx-4090", tmp_path) == [
        *(True, False, False, 0, 0.0, False, True, 0),
        *([0], [12000], "Tensor"),
    ]


def test_checks_of_floats_find_what_torch_finds_in_zeros() -> None:
    """Numbers read from the card are zero. Needs no card."""
    torch = pytest.importorskip("torch")
    from peftplan.rehearse.inside import values

    assert {name: bool(getattr(torch, name)(torch.zeros(()))) for name in values.CHECKS} == values.CHECKS


@pytest.mark.parametrize("gpu", ["t4", "rtx-4090", "h100-80gb"])
def test_the_most_likely_of_a_large_vocabulary(gpu: str, tmp_path: Path) -> None:
    """torch divides the work by the blocks that a multiprocessor holds (`TensorTopK.cu`, `get_items_per_thread`)."""
    assert seen(SAMPLING, gpu, tmp_path) == [2, 50]


def test_what_a_graph_captures_stays_in_a_pool_of_its_own(tmp_path: Path) -> None:
    """A result of 64 MiB, and a segment of 20 for the workspace of its stream, which both go with the graph."""
    assert seen(CAPTURED, "rtx-4090", tmp_path) == [False, [0, 84, 0]]


def test_what_the_host_holds_is_read_again_as_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator's state and a step are themselves again; 8 MiB of the card and of large tensors are holes."""
    monkeypatch.chdir(tmp_path)
    assert seen(SAVING, "rtx-4090", tmp_path) == [[7, 8], [[1 << 20], [1 << 20]], 8, 0]


def test_what_is_saved_to_an_object_has_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch moves on in a file, and cannot in what only takes bytes."""
    monkeypatch.chdir(tmp_path)
    assert seen(TO_OBJECTS, "rtx-4090", tmp_path) == 2 * [[1 << 20, 1 << 20, [7, 8]]]


def test_functions_of_torch_keep_their_names(tmp_path: Path) -> None:
    """Lightning asks for the name of a reduction, and pickling for that of any function."""
    names = ("mean", "sum", "tensor", "isnan", "topk", "one_hot", "item")
    assert seen(NAMES, "rtx-4090", tmp_path) == [[name, True] for name in names]


def test_generated_text_has_the_length_that_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert seen(GENERATING, "rtx-4090", tmp_path, HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "1")) == [[3, 22], [3, 22]]


def test_what_is_made_under_a_device_is_on_it(tmp_path: Path) -> None:
    """torch asks whether a function is one of its own; and takes what has our `__getitem__` for a sequence."""
    assert seen(MAKING, "rtx-4090", tmp_path) == ["cuda", "cuda", [3]]
