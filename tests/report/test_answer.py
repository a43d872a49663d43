"""The short answer: at most 25 lines at every width, the verdict first, nothing that changes it left out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftplan import estimate
from peftplan.hardware.gpus import find_gpu, gpus
from peftplan.report import screen
from peftplan.report.answer import MOST_LINES, answer
from peftplan.report.bar import CELLS, Segment, bar
from peftplan.report.cards import card_name
from peftplan.report.screen import ASCII, UNICODE, Part, Screen
from peftplan.results.estimate import Estimate
from peftplan.results.verdict import Verdict
from tests.cli.run import run
from tests.cli.test_exit import in_terminal
from tests.report.tiny_estimate import tiny_estimate

GIB = 2**30
FOUR = "t4,24GiB,rtx-3050-laptop-4gb,h100-80gb"
JOBS = (
    "llama-2-70b --method qlora --r 16",
    "llama-2-70b --method qlora --r 16 --gpu rtx-4090,a100-80gb",
    "llama-2-7b --method full --gpu rtx-4090",
    f"mixtral-8x7b --method qlora --optim paged_adamw_32bit --gpu {FOUR}",
    f"deepseek-v3 --method qlora --gpu {FOUR}",
    f"bert-base-uncased --trainer plain --batch-size 64 --gpu {FOUR}",
    f"llama-3.2-11b-vision --method dora --batch-size 8 --gpu {FOUR}",
    f"qwen3-8b --trainer plain --batch-size 16 --attn-implementation eager --gpu {FOUR}",
    f"phi-4 --target-modules q_proj,k_proj,o_proj --gpu {FOUR}",
    f"llama-2-7b --loss unsloth --gpu {FOUR}",
    "gpt2 --method ia3 --trainer plain",
    "llama-7b --method ia3 --batch-size 8 --trainer trl-dpo --attn-implementation flash_attention_2 "
    "--gpu 2xrtx-a4000,2xrtx-4080-laptop,2xv100-pcie-32gb,2xrtx-a5500-laptop",
    f"t5-small --method prompt-tuning --num-virtual-tokens 16 --gpu {FOUR}",
    "llama-3.1-8b --r 16 --gpu rtx-4090 --gpu 8xh100 --gpu t4 --gpu 24GB",
    "llama-3.1-8b --method full --gpu 2xl4,4xt4,8xa100-80gb,rtx-4090",
)


def lines_of(result: Estimate, columns: int = 80, glyphs: screen.Glyphs = UNICODE) -> list[str]:
    """The answer as text."""
    return ["".join(part.text for part in row) for row in answer(result, Screen(columns, glyphs))]


@pytest.mark.parametrize("columns", [80, 100, None])
@pytest.mark.parametrize("job", JOBS)
def test_an_answer_has_at_most_25_lines(job: str, columns: int | None) -> None:
    done = run("estimate", *job.split(), columns=columns)
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert len(lines) <= 25
    assert columns is None or max(map(len, lines)) <= columns
    assert [line for line in lines if line != line.rstrip()] == []
    assert "\x1b" not in done.out


def test_numbers_of_gpus_have_one_answer() -> None:
    """All verdicts stand first, each below how its GPUs share the job; then a peak for each number."""
    lines = run("estimate", *JOBS[-2].split(), columns=100).out.splitlines()
    assert lines[1:3] == ["one GPU", "✓ RTX 4090: fits, 3.0 GiB left"]
    assert lines[5].startswith("DDP over 8 GPUs")
    assert lines[6].startswith("✓ H100 80GB")
    assert [line.partition(":")[0] for line in lines if ": peak " in line] == ["1 GPU", "8 GPUs"]
    everything = run("estimate", *JOBS[-2].split(), "-v", columns=100).out
    assert everything.count("llama-3.1-8b · lora r=16 · analytic") == 2


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("job", JOBS[1:5])
def test_a_terminal_gets_the_same_lines(job: str, columns: int) -> None:
    shown = in_terminal("estimate", *job.split(), columns=columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert [line.rstrip() for line in plain] == run("estimate", *job.split(), columns=columns).out.splitlines()


def test_colours_say_what_the_words_say() -> None:
    """Green fits, yellow is tight, red does not fit, and nothing else has a colour; bold is none."""
    shown = in_terminal("estimate", "llama-2-7b", "--gpu", "a100-80gb,t4", columns=80)
    coloured = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", shown)
    assert coloured[0] == ("1", "llama-2-7b · lora r=8 · analytic")
    assert coloured[1][0] == "38;5;28"
    assert coloured[1][1].startswith("✓ A100 80GB")
    assert coloured[2][0] == "38;5;160"
    assert coloured[2][1].startswith("✗ T4")
    assert {code for code, _ in coloured} <= {"1", "38;5;28", "38;5;136", "38;5;160"}
    assert "\x1b" not in in_terminal("estimate", "gpt2", "--gpu", "t4", columns=80, NO_COLOR="1")


CARD = Verdict("rtx-4090", 24 * GIB, "", "fits", 10 * GIB, GIB // 2, "")


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (CARD, "✓ RTX 4090: fits, 14.0 GiB left"),
        (CARD._replace(context_assumed=True), "✓ RTX 4090: fits, 14.0 GiB left (context 512 MiB assumed)"),
        (CARD._replace(scope="text"), "✓ RTX 4090: fits, text only, 14.0 GiB left"),
        (CARD._replace(verdict="tight", needed_bytes=23 * GIB), "! RTX 4090: tight, 1.0 GiB left"),
        (CARD._replace(verdict="tight", needed_bytes=24 * GIB - 2**24), "! RTX 4090: tight, 0.02 GiB left"),
        (
            CARD._replace(verdict="tight", needed_bytes=25 * GIB, runs_by_releasing_cache=True),
            "! RTX 4090: tight, needs 25.0 GiB of 24.0: runs only because the allocator releases cached memory",
        ),
        (
            CARD._replace(verdict="does_not_fit", needed_bytes=33 * GIB),
            "✗ RTX 4090: does not fit, needs 33.0 GiB of 24.0, 9.0 short",
        ),
        (
            CARD._replace(verdict="does_not_fit", needed_bytes=33 * GIB, lower_bound=True),
            "✗ RTX 4090: does not fit, needs at least 33.0 GiB of 24.0, 9.0 short",
        ),
        (
            CARD._replace(verdict="does_not_run", reason="flash-attn needs 8.0 (source, line 1); use sdpa", context_assumed=True),
            "✗ RTX 4090: does not run: flash-attn needs 8.0; use sdpa",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_verdict_in_words(verdict: Verdict, words: str) -> None:
    assert lines_of(replace(tiny_estimate(), gpus=(verdict,), origin=None), columns=200)[1] == words


def test_an_unknown_verdict_says_what_to_do() -> None:
    job = "estimate llama-2-7b --method partial --optim adagrad --strategy fsdp1 --gpu 4xa100-40gb"
    lines = run(*job.split(), columns=None).out.splitlines()
    assert lines[2].startswith("? A100 40GB: unknown, needs at least ")
    assert "--engine trace" in lines[2]


def test_no_stays_beside_what_is_off() -> None:
    """The list of NeMo Automodel's defaults that are off is longer than a line of 80 columns."""
    job = "estimate llama-3.2-1b --trainer automodel --gpus 8 --strategy fsdp2 --method lora"
    lines = run(*job.split(), columns=80).out.splitlines()
    assert [line for line in lines if line.endswith(" no")] == []
    assert any("no gradient_checkpointing, padding" in line for line in lines)


@pytest.mark.parametrize(
    ("lines", "unknown"),
    [
        ("for p in model.parameters():\n    p.requires_grad = False\n", "weights.call"),
        ("model = get_peft_model(model, LoraConfig(target_modules=names_of(model)))\n", "lora.target_modules"),
        ("", None),
    ],
)
def test_a_count_that_an_unsupported_key_decides_is_unknown(tmp_path: Path, lines: str, unknown: str | None) -> None:
    (program := tmp_path / "run.py").write_text(
        f"model = AutoModelForCausalLM.from_pretrained('gpt2')\n{lines}SFTTrainer(model, SFTConfig())\n"
    )
    shown = run("estimate", "--config", str(program)).out
    assert ("trainable 124,439,808 of 124,439,808 parameters" in shown) == (unknown is None)
    assert (f"trainable parameters unknown: unsupported keys ({unknown})" in shown) == (unknown is not None)


def test_what_a_strategy_keeps_on_the_host_is_said() -> None:
    """70B in full by FSDP2 with its parameters on the host: 16 bytes of each, half of them on each rank."""
    result = estimate("llama-3.1-70b", method="full", gpu="2xh100-80gb", strategy="fsdp2", offload_params="cpu")
    assert "and 525.67 GiB per rank in host memory, 1,051.33 GiB on a node" in lines_of(result)
    counts_of_steps = estimate("llama-3.2-1b", method="qlora", gpus=2, strategy="zero3", optim="adagrad")
    assert counts_of_steps.distributed is not None
    assert counts_of_steps.distributed.host_bytes
    assert not [line for line in lines_of(counts_of_steps) if "host memory" in line]


def test_an_incomplete_peak_is_said() -> None:
    unknown = tuple(f"model.part{n}" for n in range(5))
    lines = lines_of(tiny_estimate(incomplete=unknown), columns=200)
    assert "the peak is a lower bound: model.part0" in lines
    assert "and 3 more that the trace could not follow (-v)" in lines


def test_a_card_is_written_as_it_can_be_typed() -> None:
    assert card_name("a100-pcie-80gb") == "A100 PCIe 80GB"
    assert card_name("rtx-4060-ti-16gb") == "RTX 4060 Ti 16GB"
    assert card_name("24GiB") == "24GiB"
    assert [gpu.id for gpu in gpus() if find_gpu(card_name(gpu.id)) != gpu] == []


def test_a_bar_is_drawn_to_scale() -> None:
    """6 of 8 GiB: 4 + 2 of 8 parts of 72 cells, and what is free; 12 of 8: the card ends after two thirds."""
    parts = [Segment("weights", 4 * GIB), Segment("gradients", 2 * GIB)]
    assert bar(parts, 8 * GIB, UNICODE) == (Part("█" * 36 + "▓" * 18 + "·" * 18), Part("│"), Part("", None))
    over = bar([*parts, Segment("logits", 6 * GIB)], 8 * GIB, UNICODE)
    assert over == (Part("█" * 24 + "▓" * 12 + "▒" * 12), Part("│"), Part("▒" * 24, "red"))
    assert bar(parts, None, ASCII) == (Part("#" * 48 + "=" * 24),)
    assert CELLS == 72


def test_a_stream_without_block_letters_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    class Latin:
        encoding = "latin-1"

    monkeypatch.setattr(screen.sys, "stdout", Latin())
    assert screen.glyphs() is ASCII
    shown = "\n".join(lines_of(estimate("llama-2-7b", gpu=["t4", "a100-80gb"]), glyphs=ASCII))
    assert shown.isascii()
    assert "\nx T4: does not fit, needs " in shown
    assert "\n+ A100 80GB: " in shown


def test_what_was_set_is_no_assumption() -> None:
    job: dict[str, Any] = {"batch_size": 1, "seq_len": 2048, "target_modules": "q_proj"}
    assumed = "\n".join(lines_of(estimate("llama-2-7b", **job))).partition("assumed: ")[2]
    assert not {"batch_size", "seq_len", "target_modules"} & set(re.findall(r"\w+", assumed))
    assert {"trainer", "loss", "optim"} < set(re.findall(r"\w+", assumed))
    assert assumed.startswith("trainer transformers · gradient_checkpointing · loss full")


def test_assumptions_are_cut_before_anything_else() -> None:
    notes = [f"note {n}" for n in range(12)]
    result = estimate("llama-2-7b", method="qlora", gpu="t4")
    lines = lines_of(replace(result, assumptions={**result.assumptions, "notes": notes}))
    assert len(lines) == MOST_LINES
    assert [line for line in lines if line.startswith("note: ")] == [f"note: {note}" for note in notes]
    assert re.fullmatch(r"  and \d more lines: -v", lines[-1])


def test_how_a_count_was_checked_needs_no_line() -> None:
    note = "published total is 2,048 more"
    assert note not in run("estimate", "llama-2-7b").out
    assert note in run("estimate", "llama-2-7b", "-v", columns=None).out


def test_what_is_not_counted_is_told_apart() -> None:
    """An item holds a comma, so that a semicolon stands between two."""
    text = run("estimate", "gpt2", "--gpu", "2xh100-80gb", columns=200).out
    assert "not counted: buffers of NCCL, outside torch's allocator; what cuDNN's attention takes" in text


def test_an_item_that_is_longer_than_a_line_breaks_between_words() -> None:
    item = "no " + ", ".join(["gradient_checkpointing"] * 5)
    words = {word for row in screen.flowing(["loss full", item], 60, between=" · ") for part in row for word in part.text.split()}
    assert words == {"loss", "full", "·", "no", "gradient_checkpointing,", "gradient_checkpointing"}


def test_advice_names_the_keys_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "q.yml"
    # gradient_accumulation_steps has the option's own name; rows of a packed batch are a product of two keys
    text = "base_model: NousResearch/Llama-3.2-1B\nadapter: lora\nlora_target_linear: true\nbf16: true\ndatasets: [{path: x}]\n"
    file.write_text(f"{text}sequence_len: 2048\nmicro_batch_size: 16\ngradient_accumulation_steps: 4\n")
    shown = "\n".join(lines_of(estimate(config=file, gpu="rtx-4090"), 120))
    assert "q.yml: --batch-size is micro_batch_size, --seq-len is sequence_len" in shown
    file.write_text(f"{text}sequence_len: 2048\nmicro_batch_size: 16\nsample_packing: true\nflash_attention: true\n")
    packed = "\n".join(lines_of(estimate(config=file, gpu="rtx-4090"), 120))
    assert "to fit" in packed
    assert "--seq-len is" not in packed
