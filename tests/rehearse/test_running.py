"""What a rehearsal does with a program that leaks, runs out of memory, hangs, forks, asks a monitor, or lacks its data."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from peftplan.errors import InputError
from peftplan.hardware.gpus import find_gpu
from peftplan.planning.replayed import replay_file
from peftplan.planning.verdicts import kernels_on
from peftplan.rehearse import rehearse
from peftplan.report import timeline
from peftplan.results.rehearsal import Rehearsal
from peftplan.tape.column_sums import elements

pytestmark = pytest.mark.rehearse

LOOP = """
import gc, sys, time, torch
model = torch.nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.AdamW(model.parameters())
gc.freeze()
kept = []
for step in range(5):
    model(torch.randn(64, 1024).cuda()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if "leak" in sys.argv:
        kept.append(torch.zeros(1 << 22, device="cuda"))
    if "hang" in sys.argv and step == 1:
        time.sleep(600)
    if "large" in sys.argv:
        torch.zeros(1 << 36, device="cuda")
"""
MONITORED = """
import ctypes, json, multiprocessing, os, subprocess, torch
from torch.utils.data import DataLoader
def smi(*arguments):
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True).stdout.split("\\n")[:-1]
def spawned(queue):
    queue.put(torch.ones(3, device="cuda").shape[0])
if __name__ == "__main__":
    x = torch.zeros(1 << 28, device="cuda")
    free, total = torch.cuda.mem_get_info()
    queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=spawned, args=(queue,))
    process.start()
    got = queue.get()
    process.join()
    forked = os.fork()
    if not forked:
        os._exit(5)
    print("SEEN", json.dumps({
        "table": smi("--query-gpu=index,name,memory.used,memory.total,unheard.of", "--format=csv,noheader,nounits"),
        "list": smi("-L"),
        "second": smi("--query-gpu=memory.used", "--format=csv", "-i", "1"),
        "unknown": smi("topo", "-m"),
        "used": (total - free) >> 20,
        "total": total >> 20,
        "spawned": got,
        "forked": os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]),
        "loaded": [len(batch) for batch in DataLoader(range(8), batch_size=4, num_workers=2, pin_memory=True)],
    }), flush=True)
"""
FULL = """
import subprocess, sys, torch
free, total = torch.cuda.mem_get_info()
if len(sys.argv) == 1:
    x = torch.empty(free - (20 << 20), dtype=torch.uint8, device="cuda")
    print("SEEN", subprocess.run([sys.executable, __file__, "child"], capture_output=True, text=True).stdout)
else:
    print([free, total >> 30])
"""
SHIFTED = """
import json
import torch
labels = torch.ones(2, 8, dtype=torch.int64).to("cuda")
ignored = torch.full_like(labels[..., :1], -100), labels.new_full((2, 1), -100)
targets = [torch.cat([labels[..., 1:], last], dim=-1) for last in ignored]
kept = targets[0] != -100
kept &= torch.ones_like(labels) > 0
print("SEEN", json.dumps([len(mask.nonzero()) for mask in (kept, targets[1] >= 0)]))
"""
DATA = """
import json
from datasets import load_dataset
whole, test = load_dataset("nobody/nothing"), load_dataset("nobody/nothing", split="test[:10]")
row = whole["unheard_of"][0]
print("SEEN", json.dumps({"columns": test.column_names, "words": row["prompt"].count(" the"), "label": row["label"],
    "roles": [turn["role"] for turn in row["messages"]]}))
"""


def run(program: str, tmp_path: Path, *words: str, launcher: Sequence[str] = (), **options: Any) -> tuple[Rehearsal, str]:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    path, output = tmp_path / "program.py", tmp_path / "output"
    path.write_text(program, encoding="utf-8")
    with output.open("w") as file:
        result = rehearse(
            [*(launcher or [sys.executable]), str(path), *words], **{"gpu": "2xrtx-4090", **options}, stdout=file.fileno()
        )
    return result, output.read_text(encoding="utf-8")


def seen(output: str) -> Any:
    return json.loads(next(line for line in output.splitlines() if line.startswith("SEEN"))[len("SEEN") :])


def test_growth_from_step_to_step_is_said_and_drawn(tmp_path: Path) -> None:
    result, _ = run(LOOP, tmp_path, "leak", steps=4, record=True)
    assert any("step 4 needed 33,554,432 bytes more than step 2" in note for note in result.notes)  # two tensors of 16 MiB
    assert result.versions["torch"].startswith("2.")
    assert result.host_bytes > 2**26
    assert result.recording is not None
    series = result.recording.series()
    rank = result.largest_rank
    assert rank is not None
    assert (max(series.total), max(series.reserved or ())) == (rank.peak_allocated, rank.peak_reserved)
    at = series.total.index(max(series.total))
    assert {category: levels[at] for category, levels in series.by_category.items() if levels[at]} == rank.by_category
    assert rank.by_category["weights"] == 2**22 + 2**12
    assert [span.phase for span in series.phases][:4] == ["load", "forward", "backward", "step"]
    for suffix in (".html", ".json"):
        timeline.write(result, str(tmp_path / f"drawn{suffix}"))
    assert replay_file(str(tmp_path / "drawn.json")).result.peaks.allocated == rank.peak_allocated
    assert "recording" not in result.to_dict()


TRIED = """
import torch
trial = torch.nn.Linear(4096, 4096).cuda()
trial(torch.ones(8, 4096, device="cuda")).sum().backward()
del trial
"""


def test_what_runs_before_there_is_an_optimizer_is_loading(tmp_path: Path) -> None:
    result, _ = run(TRIED + LOOP, tmp_path)
    rank = result.largest_rank
    assert rank is not None
    assert [step.step for step in rank.steps] == [1, 2, 3]
    assert rank.peak_by_phase["load"] > 2**27 > rank.peak_by_phase["step"]


def test_out_of_memory_says_who_asked_and_what_was_alive(tmp_path: Path) -> None:
    result, _ = run(LOOP, tmp_path, "large")
    oom = result.to_dict()["oom"]
    assert (result.exit_code, result.ended, result.gpus[0].verdict) == (1, "out_of_memory", "does_not_fit")
    assert (oom["rank"], oom["phase"], oom["step"], oom["requested_bytes"]) == (0, "step", 1, 2**38)
    verdict = result.gpus[0]
    assert verdict.needed_bytes > 2**38 > verdict.usable_bytes
    assert verdict.lower_bound
    assert (oom["file"], oom["line"]) == (str(tmp_path / "program.py"), 1 + LOOP.splitlines().index(f"        {oom['code']}"))
    assert oom["code"] == 'torch.zeros(1 << 36, device="cuda")'
    assert {row["category"] for row in oom["alive"]} >= {"weights", "optimizer_states"}


def test_a_first_tensor_that_is_too_large_is_out_of_memory(tmp_path: Path) -> None:
    result, _ = run('import torch\ntorch.zeros(1 << 36, device="cuda")\n', tmp_path)
    assert (result.exit_code, result.ended, result.gpus[0].verdict) == (1, "out_of_memory", "does_not_fit")
    assert result.oom is not None
    assert (result.oom.requested_bytes, result.oom.line, result.oom.alive) == (2**38, 2, ())


EMPTIED = """
import torch
torch.empty(20 << 30, dtype=torch.uint8, device="cuda")
torch.empty(24 << 30, dtype=torch.uint8, device="cuda")
"""


def test_memory_that_was_given_back_is_not_needed_beside_what_was_requested_in_vain(tmp_path: Path) -> None:
    """24 GiB, not 44."""
    result, _ = run(EMPTIED, tmp_path)
    verdict = result.gpus[0]
    assert (verdict.needed_bytes, verdict.lower_bound) == ((24 << 30) + verdict.context_bytes, True)


INVERTED = """
import torch
labels = torch.zeros(8, 64, dtype=torch.int64).cuda()
layer = torch.nn.Linear(16, 16).cuda()
optimizer = torch.optim.AdamW(layer.parameters())
for _ in range(3):
    layer(torch.randn(4, 16).cuda()).sum().backward()
    torch.linalg.pinv(layer.weight.detach() @ layer.weight.detach().T)
    optimizer.step()
"""


def test_a_solver_that_says_whether_it_converged(tmp_path: Path) -> None:
    """What it says is a number read from the card, which would be the count of labels."""
    result, _ = run(INVERTED, tmp_path)
    assert (result.ended, result.steps, result.exit_code) == ("steps", 3, 0)


SUMS = """
import torch
x = torch.empty(16384, 768, dtype=torch.float16, device="cuda")
before = torch.cuda.memory_allocated()
total = x.sum(0)
print("SEEN", torch.cuda.max_memory_allocated() - before - 1536)
"""


@pytest.mark.parametrize("gpu", ["t4", "a100-80gb", "rtx-4090", "l4", "rtx-3060"])
def test_sums_over_rows_take_the_buffers_that_the_engines_count(gpu: str, tmp_path: Path) -> None:
    """Their size depends on the card's multiprocessors; torch does not split off the last MiB of a segment (`kSmallSize`)."""
    _, card = kernels_on(find_gpu(gpu))
    partial = 4 * int(elements("partial sums", rows=16384, columns=768, card=card))
    assert 0 <= seen(run(SUMS, tmp_path, gpu=gpu, steps=0)[1]) - partial - 512 <= 2**20


EQUAL = """
import torch
a = torch.ones(4, 4, device="cuda")
print("SEEN", [int(torch.equal(a, b)) for b in (a, a.clone())] + [int(torch.equal(a[0], a[1]))])
"""


def test_two_weights_of_the_card_differ_and_two_tables_do_not(tmp_path: Path) -> None:
    """A loader that compares a head with its embedding would tie what the checkpoint ships as two; Unsloth runs experts in
    groups if the tables of their 4 bits are equal."""
    assert seen(run(EQUAL, tmp_path, steps=0)[1]) == [1, 0, 1]


def test_labels_that_a_loss_shifts_keep_their_values(tmp_path: Path) -> None:
    assert seen(run(SHIFTED, tmp_path, steps=0)[1]) == [14, 14]  # the last label of each row is ignored


PLACES = """
import torch
labels = torch.tensor([[1, 2, -100], [4, 5, -100]]).cuda()
print("SEEN", [len(torch.where(labels.reshape(-1) != -100)[0]), len((labels != -100).nonzero())])
"""


def test_where_gives_the_true_places_of_a_mask(tmp_path: Path) -> None:
    """Labels that are shifted already: none of a row is left out but the one that is ignored."""
    assert seen(run(PLACES, tmp_path, steps=0)[1]) == [4, 4]


WHOLE = """
import torch
@torch.compile(fullgraph=True, dynamic=True)
def norm(x):
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
for rows in (64, 65, 66):
    norm(torch.ones(rows, 512, dtype=torch.bfloat16).cuda())
labels = torch.tensor([[1, 2, -100]]).cuda()
print("SEEN", [len(torch.where(labels.reshape(-1) != -100)[0]), torch._dynamo.utils.counters["stats"]["unique_graphs"]])
"""


def test_what_torch_compiles_stays_one_graph(tmp_path: Path) -> None:
    """Three sizes and one graph, or two where the first was taken for the only one. What is read afterwards is still followed."""
    places, graphs = seen(run(WHOLE, tmp_path, steps=0)[1])
    assert places == 2
    assert graphs in (1, 2)


JOINED = """
import torch
@torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
def turned(x):
    first, second = x.float().view(x.shape[0], -1, 8).chunk(2, dim=-1)
    return torch.where(torch.isnan(first), first, torch.cat((-second, first), dim=-1).sum(-1, keepdim=True))
turned(torch.ones(1, 16).cuda())
for rows in (64, 65, 66):
    turned(torch.ones(rows, 512, dtype=torch.bfloat16).cuda())
print("SEEN", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_what_torch_compiles_knows_the_functions_that_are_followed(tmp_path: Path) -> None:
    """One graph for each dtype: none is split at `cat`, and none is translated again because `cat` is ours when it runs."""
    assert seen(run(JOINED, tmp_path, steps=0)[1]) == 2


COMPILED_FIRST = """
import torch
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
found = torch.zeros(3).cuda().isnan().any()
print("SEEN", int(found.logical_or(found).device.type == "cuda"))
"""


def test_masks_are_subclasses_after_torch_compiled(tmp_path: Path) -> None:
    """`Tensor.__torch_function__` is bound anew each time: taken for ours, it would stand on the class bound to `Tensor`."""
    assert seen(run(COMPILED_FIRST, tmp_path, steps=0)[1]) == 1


def test_a_program_that_hangs_is_ended_and_reported_up_to_there(tmp_path: Path) -> None:
    result, _ = run(LOOP, tmp_path, "hang", timeout=60)
    assert (result.exit_code, result.ended, result.steps) == (1, "timeout", 2)


def test_a_command_that_the_system_does_not_start(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n", encoding="ascii")
    script.chmod(0o755)
    with pytest.raises(InputError, match=r"COMMAND: .*; it does not start: No such file or directory"):
        rehearse([str(script)])
    assert rehearse(["sh", "-c", "exit 127"]).exit_code == 127  # the program's own


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_all_of_it(number: signal.Signals, code: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    path, started = tmp_path / "program.py", tmp_path / "started"
    path.write_text(f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n", encoding="utf-8")
    command = [sys.executable, "-m", "peftplan", "rehearse", "--keep-writes", "--network", "--", sys.executable, str(path)]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell runs in the background ignores it
    )
    for _ in range(1200):
        if started.exists() and started.read_text(encoding="ascii"):
            break
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == code
    assert list(temporary.glob("peftplan-*")) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text(encoding="ascii")), 0)


def test_monitors_workers_and_children(tmp_path: Path) -> None:
    result, output = run(MONITORED, tmp_path, steps=0)
    shown = seen(output)
    first, second = shown["table"]
    assert first == f"0, NVIDIA GeForce RTX 4090, {shown['used']}, {shown['total']}, [N/A]"
    assert shown["used"] > 1024
    assert second.split(", ")[2] == "0"
    assert shown["second"] == ["memory.used [MiB]", "0 MiB"]
    assert [line.partition(" (")[0] for line in shown["list"]] == [f"GPU {index}: NVIDIA GeForce RTX 4090" for index in range(2)]
    assert (shown["spawned"], shown["forked"], shown["loaded"]) == (3, 5, [4, 4])
    assert any("nvidia-smi topo -m was not answered" in note for note in result.notes)
    assert result.exit_code == 0


def test_a_second_process_on_a_full_card_finds_nothing_free(tmp_path: Path) -> None:
    assert seen(run(FULL, tmp_path, gpu="24GiB", steps=0)[1]) == [0, 24]


def test_rows_answer_for_a_data_set_that_is_not_here(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    result, output = run(DATA, tmp_path, data="synthetic:prompt,label,messages", seq_len=100, steps=0)
    assert seen(output) == {"columns": ["prompt", "label", "messages"], "words": 50, "label": 0, "roles": ["user", "assistant"]}
    assert any("nobody/nothing: 1,024 rows of prompt, label, messages with 100 tokens" in text for text in result.replaced)
    result, _ = run(DATA, tmp_path, steps=0)
    assert result.exit_code == 1
    assert any("--data synthetic answers for it" in note for note in result.notes)


POOLED = """
import random, time, torch
from concurrent.futures import ThreadPoolExecutor
begun = []
def copied(size):
    time.sleep(random.random() / 50)
    begun.append(size)
    return torch.empty(size << 20, dtype=torch.uint8, device="cuda")
torch.zeros(1, device="cuda")
with ThreadPoolExecutor(4) as pool:
    held = list(pool.map(copied, range(1, 20)))
print("SEEN", begun)
"""


def test_threads_that_load_do_it_in_order(tmp_path: Path) -> None:
    """In four threads, 19 sizes would begin in a random order."""
    result, output = run(POOLED, tmp_path, steps=0)
    assert seen(output) == list(range(1, 20))
    assert any("threads copied to the card" in note for note in result.notes)


def test_a_program_that_never_steps_is_reported_with_what_it_held(tmp_path: Path) -> None:
    result, _ = run('import torch\nx = torch.zeros(1 << 28, device="cuda")', tmp_path)
    rank = result.largest_rank
    assert rank is not None
    assert (result.exit_code, result.ended, result.steps, rank.peak_allocated) == (0, "program", 0, 2**30)
    assert result.gpus[0].verdict == "unknown"
    assert any("no optimizer step was completed" in note for note in result.notes)


@pytest.mark.parametrize(
    ("last", "code", "shown"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit(255)", 255, ""),
        ('raise ValueError("mine")', 1, "ValueError: mine"),
    ],
)
def test_a_program_that_exits_early_shows_its_own_end_and_a_report(
    last: str, code: int, shown: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one_step = LOOP.replace("import gc", "import gc, os, signal").replace(
        '    if "leak"', f'    if step == 1:\n        {last}\n    if "leak"'
    )
    result, _ = run(one_step, tmp_path)
    assert (result.exit_code, result.ended) == (code, "program")
    assert shown in capfd.readouterr().err
    assert not any("ended by" in note for note in result.notes)
    assert (result.steps, result.to_dict()["program_exit"]) == (2, code)
    assert any("ended after 2 of 3 steps" in note for note in result.notes)


KILLED = """
import os, signal, sys, time, torch
torch.cuda.init()
held = torch.zeros(1 << 28, device="cuda")
end = getattr(signal, sys.argv[1])
if "loading" in sys.argv:
    time.sleep(3)
    os.kill(os.getpid(), end)
model = torch.nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    model(torch.randn(64, 1024).cuda()).square().mean().backward()
    optimizer.step()
    if step == 1:
        os.kill(os.getpid(), end)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
"""torchrun, where its command is not on PATH."""


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["python", "torchrun"])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_program_that_a_signal_ends_is_reported_up_to_there(name: str, launcher: list[str], tmp_path: Path) -> None:
    result, _ = run(KILLED, tmp_path, name, launcher=launcher)
    stated = result.to_dict()
    number = getattr(signal, name)
    assert (result.exit_code, result.ended, result.steps) == (128 + number, "program", 2)
    assert stated["program_exit"] == (128 + number if launcher else -number)
    assert any(f"ended by {name}" in note for note in result.notes)
    rank = result.largest_rank
    assert rank is not None
    weights = 2**22 + 2**12
    assert rank.peak_by_phase["step"] >= 2**30 + 4 * weights  # weights, gradients and two states
    assert [step.step for step in rank.steps] == [1, 2]


def test_a_program_that_is_killed_while_it_loads_is_reported_up_to_there(tmp_path: Path) -> None:
    result, _ = run(KILLED, tmp_path, "SIGKILL", "loading", record=True)
    rank = result.largest_rank
    assert rank is not None
    assert (result.exit_code, result.steps) == (128 + signal.SIGKILL, 0)
    assert (rank.peak_allocated, rank.peak_reserved, rank.peak_by_phase) == (2**30, 2**30, {"load": 2**30})
    assert result.gpus[0].verdict == "unknown"
    assert any("as the kernel does when the host has no memory left" in note for note in result.notes)
    assert any(note.startswith("--timeline: nothing was written") for note in result.notes)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"gpu": "8xrtx-4090"}, "the program used 1 of 8 cards"),
        ({"gpu": "8xrtx-4090", "world_size": 8}, "initialised no process group"),
    ],
)
def test_several_gpus_that_a_program_does_not_take_are_said(options: dict[str, Any], note: str, tmp_path: Path) -> None:
    result, _ = run(LOOP, tmp_path, steps=1, **options)
    assert any(note in text for text in result.notes)


SAVING = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, vocab_size=64)).cuda()
optimizer = torch.optim.SGD(model.parameters())
try:
    for _ in range(3):
        model(input_ids=torch.zeros(1, 8, dtype=torch.long, device="cuda")).logits.sum().backward()
        optimizer.step()
finally:
    model.save_pretrained("out")
    print("SEEN", json.dumps([model.push_to_hub("someone/something", commit_message="done").commit_message,
        open("out/model.safetensors", "rb").read(8) != b"precious"]))
"""


def test_a_checkpoint_that_is_there_survives_and_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that listens where the Hub is said to be hears nothing."""
    pytest.importorskip("transformers")
    checkpoint = tmp_path / "out" / "model.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"precious weights")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        result, output = run(SAVING, tmp_path, steps=1)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (result.ended, seen(output)) == ("steps", ["done", True])
    assert any("create_commit of someone/something was left out" in note for note in result.notes)
    assert checkpoint.read_bytes() == b"precious weights"
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model.safetensors"]


SYNCHRONISED = """
import torch, torch.distributed as dist
dist.init_process_group("nccl")
model = torch.nn.Sequential(torch.nn.Linear(8, 16 * (1 + dist.get_rank())), torch.nn.BatchNorm1d(16 * (1 + dist.get_rank())))
model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(4, 8).cuda()).sum().backward()
optimizer.step()
"""


def test_a_launcher_s_ranks_are_played_one_after_another(tmp_path: Path) -> None:
    """The launcher alone says how many there are. A batch norm over all of them gathers rows of statistics."""
    result, _ = run(SYNCHRONISED, tmp_path, launcher=TORCHRUN, rank="all")
    assert [(rank.rank, rank.steps[-1].step) for rank in result.ranks] == [(number, 1) for number in range(result.world_size)]
    assert result.ranks[0].peak_allocated < result.ranks[1].peak_allocated


SHARDED = """
import torch, torch.distributed as dist, torch.distributed.checkpoint as checkpoint
from torch.distributed.fsdp import fully_shard
dist.init_process_group("nccl")
model = torch.nn.Linear(1024, 1024).cuda()
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(4, 1024).cuda()).sum().backward()
optimizer.step()
checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id="saved")
states = {"model": model.state_dict()}
checkpoint.load(states, checkpoint_id="saved")
print("SEEN", [dist.get_world_size(), states["model"]["weight"].to_local().shape[0]])
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sharded_checkpoint_is_written_and_read_by_one_rank(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result, output = run(SHARDED, tmp_path, launcher=TORCHRUN, rank=rank, steps=0)
    assert (result.exit_code, seen(output)) == (0, [2, 512])
    assert list(tmp_path.glob("saved*")) == []


def test_weights_of_a_program_that_ends_while_it_loads_are_weights(tmp_path: Path) -> None:
    result, _ = run('import torch\nmodel = torch.nn.Linear(1024, 1024, bias=False).cuda()\nraise ValueError("no data")', tmp_path)
    rank = result.largest_rank
    assert rank is not None
    assert rank.by_category == {"weights": 2**22}
