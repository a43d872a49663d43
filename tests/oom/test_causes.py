"""Messages of real runs, rebuilt in torch's wording from the figures that people reported, and their causes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peftplan.cli import main
from peftplan.errors import InputError
from peftplan.oom import message as messages
from peftplan.oom.causes import causes, place_of
from peftplan.oom.diagnosis import explain_oom
from peftplan.oom.message import Frame
from peftplan.units import GIB, MIB, format_bytes
from tests.cli.run import run

HINT = " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."


def modern(tried: str, capacity: str, free: str, process: str, allocated: str, unallocated: str, *, gpu: int = 0) -> str:
    """As torch says it since 2.1."""
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {tried}. GPU {gpu} has a total capacity of {capacity} "
        f"of which {free} is free. {process}Of the allocated memory {allocated} is allocated by PyTorch, and {unallocated} is "
        f"reserved by PyTorch but unallocated.{HINT}"
    )


def older(tried: str, capacity: str, allocated: str, free: str, reserved: str, *, gpu: int = 0) -> str:
    """As torch said it until 2.0."""
    return (
        f"OutOfMemoryError: CUDA out of memory. Tried to allocate {tried} (GPU {gpu}; {capacity} total capacity; {allocated} "
        f"already allocated; {free} free; {reserved} reserved in total by PyTorch) If reserved memory is >> "
        "allocated memory try setting max_split_size_mb to avoid fragmentation."
    )


def traceback(*frames: tuple[str, str, str]) -> str:
    lines = "".join(f'  File "{file}", line 10, in {function}\n    {code}\n' for file, function, code in frames)
    return f"Traceback (most recent call last):\n{lines}"


def own(size: str) -> str:
    return f"Including non-PyTorch memory, this process has {size} memory in use. "


TRAINER = ("/venv/lib/python3.11/site-packages/transformers/trainer.py", "evaluation_loop", "all_preds.add(logits)")
CONCATENATING = ("transformers/trainer_pt_utils.py", "torch_pad_and_concatenate", "tensor1.new_full(new_shape, padding_index)")
REAL: dict[str, tuple[str, str]] = {
    # evaluation keeps logits; it grows until it overflows
    "MAGICS-LAB/DNABERT_2#78": (
        traceback(TRAINER) + modern("4.44 GiB", "10.58 GiB", "4.44 GiB", own("6.14 GiB"), "5.77 GiB", "178.42 MiB"),
        "evaluation",
    ),
    # compute_metrics over a whole vocabulary
    "huggingface/transformers#26702": (
        traceback(CONCATENATING) + older("12.94 GiB", "39.56 GiB", "18.33 GiB", "12.29 GiB", "25.71 GiB"),
        "evaluation",
    ),
    "hpcaitech/ColossalAI#3509": (
        traceback(("coati/trainer/strategies/colossalai.py", "optimizer_step", "optimizer.step()"))
        + older("3.12 GiB", "23.70 GiB", "22.00 GiB", "292.56 MiB", "22.29 GiB", gpu=5),
        "step",
    ),
    # full fine-tuning on seven cards
    "OpenBMB/MiniCPM-V#299": (
        traceback(("transformers/trainer.py", "train", "self.optimizer.step()"))
        + modern("4.54 GiB", "39.39 GiB", "590.06 MiB", own("38.81 GiB"), "34.27 GiB", "2.76 GiB", gpu=6),
        "step",
    ),
    # T5-11B
    "facebookresearch/ParlAI#4452": (
        traceback(("parlai/utils/fp16.py", "backward", "loss.backward()"))
        + older("21.06 GiB", "79.35 GiB", "63.19 GiB", "8.57 GiB", "68.48 GiB", gpu=3),
        "backward",
    ),
    # eager attention, with 2.51 GiB cached for a request of 2
    "meta-llama/llama-cookbook#309": (
        traceback(("transformers/models/llama/modeling_llama.py", "forward", "attn_weights = torch.matmul(query_states, keys)"))
        + modern("2.00 GiB", "14.58 GiB", "635.56 MiB", "Process 26469 has 13.96 GiB memory in use. ", "11.23 GiB", "2.51 GiB"),
        "fragmentation",
    ),
    # 3.87 GiB cached, 250 MiB asked for
    "pytorch/pytorch#152135": (
        modern("250.00 MiB", "79.26 GiB", "104.75 MiB", "Process 1007710 has 79.14 GiB memory in use. ", "74.77 GiB", "3.87 GiB"),
        "fragmentation",
    ),
    "OpenHelix-Team/cobra#24": (
        modern("158.00 MiB", "23.69 GiB", "115.69 MiB", "Process 21422 has 23.57 GiB memory in use. ", "22.14 GiB", "910.35 MiB"),
        "fragmentation",
    ),
    "haotian-liu/LLaVA#1152": (older("284.00 MiB", "31.75 GiB", "27.12 GiB", "99.50 MiB", "30.44 GiB"), "fragmentation"),
    "murong-xu/CADS#4": (
        modern("22.78 GiB", "31.47 GiB", "12.73 GiB", own("18.73 GiB"), "9.08 GiB", "9.35 GiB"),
        "too_large",
    ),
    # Windows lends host memory
    "bmaltais/kohya_ss#2217": (modern("30.00 MiB", "11.00 GiB", "0 bytes", "", "16.98 GiB", "696.75 MiB"), "host_memory"),
    "huggingface/meshgen#7": (modern("1002.00 MiB", "8.00 GiB", "0 bytes", "", "13.98 GiB", "129.48 MiB"), "host_memory"),
    # 2.35 GiB are free for 20 MiB
    "jhc13/taggui#188": (modern("20.00 MiB", "4.00 GiB", "2.35 GiB", "", "825.15 MiB", "24.85 MiB"), "limit"),
    # QLoRA of a 13B on a card of 79 GiB, nothing cached
    "lm-sys/FastChat#2701": (older("1.25 GiB", "79.10 GiB", "76.13 GiB", "290.12 MiB", "77.47 GiB", gpu=1), "too_large"),
    "mistralai/mistral-finetune#69": (
        modern("896.00 MiB", "21.99 GiB", "759.38 MiB", own("0 bytes"), "20.52 GiB", "102.08 MiB"),
        "too_large",
    ),
    "liucongg/ChatGLM-Finetuning#23": (older("144.00 MiB", "31.75 GiB", "30.26 GiB", "68.69 MiB", "30.33 GiB"), "too_large"),
    "stochasticai/xTuring#140": (
        traceback(("train.py", "main", "model.engine.state_dict()"))
        + older("44.00 MiB", "10.75 GiB", "9.40 GiB", "58.62 MiB", "9.76 GiB"),
        "fragmentation",
    ),
}
"""Repository and number of a thread → torch's message with the figures that it reports, and the cause."""

FRAMES: dict[str, tuple[tuple[str, str, str], str]] = {
    "huggingface/transformers#17089": (("trainer.py", "evaluation_loop", "nested_concat(preds_host, logits)"), "evaluation"),
    "d8ahazard/sd_dreambooth_extension#287": (("adamw.py", "step", "state['exp_avg_sq'] = torch.zeros_like(p)"), "step"),
    "huggingface/peft#1149": (
        ("peft/utils/other.py", "prepare_model_for_kbit_training", "param.data = param.data.to(torch.float32)"),
        "kbit preparation",
    ),
    "bmaltais/kohya_ss#990": (("accelerate/accelerator.py", "prepare_model", "model = model.to(self.device)"), "load"),
    "meta-llama/llama-cookbook#309": (("modeling_llama.py", "forward", "attn_weights = torch.matmul(q, k)"), "attention"),
}
"""Threads whose frames say where memory ran out."""


@pytest.mark.parametrize("thread", FRAMES)
def test_where_a_traceback_says_that_it_was(thread: str) -> None:
    (file, function, code), expected = FRAMES[thread]
    place = place_of((Frame("train.py", 1, "main", "trainer.train()"), Frame(file, 10, function, code)))
    assert place is not None
    assert place.name == expected


@pytest.mark.parametrize("thread", REAL)
def test_the_cause_of_a_real_message(thread: str) -> None:
    text, cause = REAL[thread]
    message = messages.find(f"epoch 1 step 7\n{text}\nwandb: (failed 1).")
    assert message is not None
    assert causes(message)[0].name == cause


def test_every_figure_is_read() -> None:
    text = modern("1.25 GiB", "79.10 GiB", "290.12 MiB", own("78.40 GiB"), "76.13 GiB", "1.34 GiB", gpu=1)
    message = messages.find(text)
    assert message is not None
    assert (message.device, message.requested, message.capacity) == (1, int(1.25 * GIB), round(79.10 * GIB))
    assert message.reserved == round(76.13 * GIB) + round(1.34 * GIB)
    assert (message.free, message.process) == (round(290.12 * MIB), round(78.40 * GIB))


def test_the_first_message_of_a_log_counts_and_ranks_do_not_matter() -> None:
    first = modern("1.00 GiB", "10.00 GiB", "1.00 MiB", "", "9.00 GiB", "10.00 MiB")
    echo = modern("2.00 GiB", "10.00 GiB", "1.00 MiB", "", "9.50 GiB", "10.00 MiB")
    log = traceback(("train.py", "main", "loss.backward()")).replace("  File", "[rank0]:   File") + first + "\n" + echo
    message = messages.find(log)
    assert message is not None
    assert message.requested == GIB
    assert [frame.code for frame in message.frames] == ["loss.backward()"]


def test_what_was_expected_is_said(tmp_path: Path) -> None:
    """Llama-3.2-1B LoRA, 1 × 2048, allocates 4.5 GiB at most: 20 GiB need a batch that was longer."""
    file = tmp_path / "train.log"
    file.write_text(modern("1.00 GiB", "23.52 GiB", "10.00 MiB", own("23.40 GiB"), "20.00 GiB", "100.00 MiB"))
    longer = explain_oom(str(file), model="llama-3.2-1b", options={"method": "lora"}).expected
    assert longer is not None
    assert longer.explained_by_seq_len is not None
    assert 4096 < longer.explained_by_seq_len < 65536
    as_expected = explain_oom(str(file), model="llama-3.1-8b", options={"method": "full"}).expected
    assert as_expected is not None
    assert as_expected.explained_by_seq_len is None
    assert "too small" in as_expected.text


@pytest.mark.parametrize("line", ["y", "CUDA out of memory", "tried to allocate ", "CUDA out of memory. Tried to allocate"])
def test_a_long_log_without_a_message_is_read_in_no_time(line: str) -> None:
    started = time.process_time()
    assert messages.find(f"{line}\n" * (2**24 // len(line))) is None
    assert time.process_time() - started < 10  # 16 MiB; before, some hours for the second line


def test_the_message_itself_takes_the_place_of_a_file() -> None:
    """A shell passes it in quotes; with its traceback it is longer than a name of a file may be."""
    message = traceback(TRAINER) + modern("2.00 GiB", "23.69 GiB", "1.50 GiB", own("22.18 GiB"), "20.35 GiB", "1.37 GiB")
    assert len(message) > 255
    diagnosis = explain_oom(message)
    assert diagnosis.message is not None
    assert diagnosis.message.requested == 2 * GIB
    assert "the driver had no memory" in run("explain-oom", "RuntimeError: CUDA error: out of memory").out


@pytest.mark.parametrize("source", ["x" * 500, "nosuch.log", "", " "])
def test_what_is_neither_file_nor_message_says_how_to_pass_one(source: str) -> None:
    done = run("explain-oom", source)
    assert done.code == 2
    assert done.err.endswith("; accepted: a file, torch's message in quotes, or - for standard input\n")


@pytest.mark.parametrize(
    "source", ["RuntimeError: CUDA out of memory.", "CUDA out of memory", "torch.OutOfMemoryError: HIP out of memory. "]
)
def test_a_message_without_figures_is_no_name_of_a_file(source: str, tmp_path: Path) -> None:
    says = "is not valid; it says that memory ran out, but gives no figures; accepted: all of torch's message (Tried to allocate"
    file = tmp_path / "train.log"
    file.write_text(f"step 3\n{source}\n")
    for argument in (source, str(file)):
        done = run("explain-oom", argument)
        assert (done.code, done.out) == (2, "")
        assert says in done.err


def test_without_what_the_process_holds_no_other_is_blamed() -> None:
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.2 GiB is free."
    (cause,) = explain_oom(message).causes
    assert cause.name == "too_large"
    assert cause.evidence.endswith("requested and not free; the message does not say how much of the card this process uses")


def test_a_log_without_a_message_is_bad_input(tmp_path: Path) -> None:
    file = tmp_path / "train.log"
    file.write_text("all went well\n")
    with pytest.raises(InputError, match="no out-of-memory message"):
        explain_oom(str(file))


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be reported later", "driver"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "library"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried ...", "host"),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError\n  exitcode  : 1\n  exitcode: -9 (pid: 42)", "host"),
        ("100%|##| 3/3\nKilled\n", "host"),
        ("./train.sh: line 3:   123 Killed                  python train.py", "host"),
        ("  exitcode  : -9 (pid: 42)", "host"),
        ("kernel: Out of memory: Killed process 42 (python) total-vm:1kB", "host"),
    ],
)
def test_a_log_without_figures_has_a_cause_too(log: str, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "train.log"
    file.write_text(log)
    diagnosis = explain_oom(file)
    assert diagnosis.message is None
    assert [each.name for each in diagnosis.causes] == [cause]


@pytest.mark.parametrize("log", ["it was not Killed here", "exitcode: -91", "MemoryErrors", "status: allocated"])
def test_a_log_that_only_sounds_like_one_has_none(log: str, tmp_path: Path) -> None:
    file = tmp_path / "train.log"
    file.write_text(log)
    with pytest.raises(InputError, match="no out-of-memory message"):
        explain_oom(file)


@pytest.mark.parametrize(
    ("capacity", "says"),
    [("23.52 GiB", "has room for it"), ("16.60 GiB", "is too small for it"), ("15.00 GiB", "is too small for it")],
)
def test_a_job_that_stays_below_its_estimate_has_another_cause_than_its_size(capacity: str, says: str, tmp_path: Path) -> None:
    """Llama 3.1 8B's weights alone are 14.96 GiB: beyond a card of 15 GiB, and not the reason on one of 23.5 GiB. It reserves
    16.38 GiB, which a CUDA context does not leave on one of 16.6."""
    file = tmp_path / "train.log"
    file.write_text(modern("1.96 GiB", capacity, "0.20 GiB", own("11.31 GiB"), "10.66 GiB", "200.19 MiB"))
    expected = explain_oom(file, model="llama-3.1-8b", options={"method": "lora", "seq_len": 512}).expected
    assert expected is not None
    assert says in expected.text


@pytest.mark.parametrize("fmt", ["table", "json", "csv", "markdown"])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], fmt: str) -> None:
    file = tmp_path / "train.log"
    file.write_text(REAL["MAGICS-LAB/DNABERT_2#78"][0])
    with pytest.raises(SystemExit) as stopped:
        main(["explain-oom", str(file), "--format", fmt])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "eval_accumulation_steps" in out
    if fmt == "json":
        document: dict[str, Any] = json.loads(out)
        assert document["causes"][0]["name"] == "evaluation"


def test_options_of_a_job_need_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.log"
    file.write_text(REAL["MAGICS-LAB/DNABERT_2#78"][0])
    with pytest.raises(SystemExit) as stopped:
        main(["explain-oom", str(file), "--batch-size", "4"])
    assert stopped.value.code == 2
    assert "--batch-size" in capsys.readouterr().err


PROGRAMS = Path(__file__).parent / "programs"
SNAPSHOTS: dict[str, str] = {
    "evaluation_graph": "kept",
    "outputs_kept": "kept",
    "long_batch": "longer_batch",
    "first_step": "step",
    "first_forward": "forward",
    "fragmented": "fragmentation",
}
"""Programs that run out of memory, and why; `snapshots` holds what torch's allocator recorded of them on an emulated T4."""


@pytest.mark.parametrize("program", SNAPSHOTS)
def test_the_cause_of_a_snapshot(program: str, tmp_path: Path) -> None:
    assert _cause_of(_recorded(program), tmp_path) == SNAPSHOTS[program]


@pytest.mark.rehearse
@pytest.mark.parametrize("program", SNAPSHOTS)
def test_a_program_that_runs_out_of_memory_says_so_again(program: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    snapshot, file = tmp_path / "out", str(PROGRAMS / f"{program}.py")
    command = [sys.executable, "-m", "peftplan", "rehearse", "--gpu", "t4", "--keep-writes", "--network", "--steps", "1000", "--"]
    ended = subprocess.run([*command, sys.executable, file, str(snapshot)], capture_output=True, check=False)
    assert ended.returncode == 1
    assert _cause_of(snapshot.read_bytes(), tmp_path) == SNAPSHOTS[program]


def _recorded(program: str) -> bytes:
    return gzip.decompress((PROGRAMS.parent / "snapshots" / f"{program}.gz").read_bytes())


def _cause_of(snapshot: bytes, folder: Path) -> str:
    file = folder / "snapshot.pickle"
    file.write_bytes(snapshot)
    return explain_oom(file).causes[0].name


@pytest.mark.parametrize(
    ("program", "blocks", "size"),
    [
        ("outputs_kept", 10, 8192 * 32000 * 4),  # the fp32 logits of every step but the last
        ("evaluation_graph", 21 * 5 + 4 - 5, 8192 * 4096 * 4),  # a batch and 4 outputs; the last output failed; 5 are a step's
    ],
)
def test_what_is_kept_is_counted(program: str, blocks: int, size: int, tmp_path: Path) -> None:
    """Hand sums: blocks of one size that the list keeps alive, less those of a training step."""
    file = tmp_path / "snapshot.pickle"
    file.write_bytes(_recorded(program))
    assert f"{format_bytes(blocks * size)} in {blocks} blocks" in explain_oom(file).causes[0].evidence


def test_markdown_of_a_snapshot_is_paragraphs_and_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Markdown reads a line that begins with four blanks as code."""
    file = tmp_path / "snapshot.pickle"
    file.write_bytes(_recorded("outputs_kept"))
    with pytest.raises(SystemExit):
        main(["explain-oom", str(file), "--format", "markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert "- evaluate under torch.no_grad(), and drop outputs before the next batch" in lines
    assert "- 1,000.00 MiB 3 blocks /app/outputs_kept.py:16 in \\<module\\>" in lines
    assert not any(line.startswith(" ") for line in lines)
    assert not any(above == below == "" for above, below in pairwise(lines))
