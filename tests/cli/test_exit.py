"""Exit codes, pipes, terminals, and that every command is documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from peftplan.cli import COMMANDS, LazyGroup, cli
from peftplan.job.setup import Setup
from tests.cli.run import HERE, run

README = HERE.parents[1] / "README.md"
MAIN = (sys.executable, "-m", "peftplan")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}


@pytest.mark.parametrize(
    "args", [(), ("--help",), ("-h",), ("--version",), *((name, "--help") for name in COMMANDS)], ids=" ".join
)
def test_help_exits_0(args: tuple[str, ...]) -> None:
    done = run(*args)
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_require_fit_exits_1_where_a_card_is_not_known_to_fit() -> None:
    job = ("estimate", "llama-2-70b", "--method", "qlora")
    assert run(*job, "--gpu", "rtx-4090").code == 0
    assert run(*job, "--gpu", "rtx-4090", "--require-fit").code == 1
    assert run(*job, "--gpu", "b200", "--require-fit").code == 0
    unknown = ("estimate", "gpt-neo-125m", "--gpu", "b200", "--require-fit")
    assert run(*unknown).code == 1  # no formula, no peak: unknown is no promise
    assert run(*job, "--require-fit").code == 2  # no card, nothing to fit


@pytest.mark.parametrize(
    ("job", "code"),
    [
        # flash-attn has no kernel for compute capability 7.5
        ("llama-3.2-1b --method qlora --gpu t4 --attn-implementation flash_attention_2 --require-fit --allow-tight", 1),
        ("llama-3.2-1b --method qlora --gpu t4 --require-fit", 0),
        # reserved 23.34 GiB of 22.16: it runs only where no context takes any of them, and then because cached memory is freed
        ("qwen3-8b --r 16 --gpu l4 --seq-len 3008 --require-fit", 1),
        ("qwen3-8b --r 16 --gpu l4 --seq-len 3008 --require-fit --allow-tight", 1),
        ("qwen3-8b --r 16 --gpu l4 --seq-len 3008 --require-fit --context 0", 1),
        ("qwen3-8b --r 16 --gpu l4 --seq-len 3008 --require-fit --allow-tight --context 0", 0),
        ("qwen3-8b --r 16 --gpu l4 --seq-len 2752 --require-fit --allow-tight", 0),
        ("qwen3-8b --r 16 --gpu h100,l4 --seq-len 2752 --require-fit", 1),
        ("qwen3-8b --r 16 --gpu h100 --seq-len 2752 --require-fit", 0),
        ("smollm2-135m --method full --seq-len 256 --batch-size 122 --gpu l4 --require-fit --allow-tight", 1),
    ],
)
def test_require_fit_asks_for_fits_on_every_card(job: str, code: int) -> None:
    done = run("estimate", *job.split())
    assert (done.code, done.err) == (code, "")


@pytest.mark.parametrize("option", ["--allow-tight", "--text-only"])
def test_what_require_fit_accepts_needs_it(option: str) -> None:
    done = run("estimate", "gpt2", "--gpu", "t4", option)
    assert (done.code, done.out, done.err) == (2, "", f"peftplan: {option} needs --require-fit\n")


@pytest.mark.parametrize("mib", ["-1", "much", "1e9", ""])
def test_a_context_that_is_no_size_is_one_line(mib: str) -> None:
    done = run("estimate", "gpt2", "--gpu", "t4", "--context", mib)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("peftplan: ")


@pytest.mark.parametrize("fmt", ["table", "json"])
def test_a_reader_that_leaves_early_does_not_hide_a_failed_check(fmt: str) -> None:
    job = ("estimate", "llama-2-70b", "--gpu", "t4", "--require-fit", "--format", fmt, *(("-v",) if fmt == "table" else ()))
    with subprocess.Popen((*MAIN, *job), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"peftplan {name}" not in text] == []


def test_every_option_of_the_setup_is_an_option_of_estimate() -> None:
    assert isinstance(cli, LazyGroup)
    command = cli.get_command(click.Context(cli), "estimate")
    assert command is not None
    assert set(Setup.model_fields) <= {param.name for param in command.params}


def test_help_of_estimate_groups_its_options() -> None:
    shown = run("estimate", "--help-all").out
    headings = re.findall(r"^([A-Z][a-z ]+):$", shown, re.M)
    assert headings == ["Method", "Model", "Precision and storage", "Training", "Options"]
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    "args",
    [("models",), ("estimate", "gpt2", "-v"), ("estimate", "gpt2", "--format", "json"), ("gpus", "--format", "csv")],
    ids=" ".join,
)
def test_a_reader_that_leaves_early_is_no_error(args: tuple[str, ...]) -> None:
    with subprocess.Popen((*MAIN, *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ("fit llama-2-70b --gpu t4 --method lora --require-fit", 1),
        ("fit gpt2 --gpu l4 --method lora --require-fit", 0),
        ("fit llama-2-70b --method full --which-gpu --require-fit", 1),
        ("fit --model-family qwen3 --gpu 1GiB --method lora --require-fit", 1),
        ("fit llama-2-70b --gpu t4 --method lora", 0),
    ],
)
def test_a_reader_that_leaves_early_does_not_change_the_answer_of_fit(args: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run((*MAIN, *args.split()), stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.parametrize("args", [("models",), ("estimate", "gpt2"), ("estimate", "gpt2", "--explain")], ids=" ".join)
def test_a_full_disk_is_one_line(args: tuple[str, ...]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run((*MAIN, *args), stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("peftplan: output: ")
    assert done.stderr.count(b"\n") == 1


def test_a_narrow_terminal_cuts_no_digits() -> None:
    narrow = run("estimate", "llama-2-70b", "--method", "qlora", columns=40).out
    assert narrow == run("estimate", "llama-2-70b", "--method", "qlora", columns=80).out


def test_a_pipe_gets_whole_rows_without_escape_codes() -> None:
    done = subprocess.run((*MAIN, "inspect", "deepseek-v3"), capture_output=True, check=True, env=ENVIRONMENT)
    text = done.stdout.decode()
    assert "\x1b" not in text
    (experts,) = [line for line in text.splitlines() if "mlp.experts" in line]
    assert "gate_up_proj 256×4096×7168, down_proj 256×7168×2048" in experts
    assert text.splitlines() == [line.rstrip() for line in text.splitlines()]


def test_a_terminal_without_unicode_gets_no_traceback() -> None:
    for args in (("estimate", "gpt2"), ("inspect", "gpt2", "--format", "json")):
        done = subprocess.run((*MAIN, *args), capture_output=True, check=True, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"})
        assert done.stdout.decode("ascii")


def in_terminal(*args: str, columns: int, **environment: str) -> str:
    """What a command writes to a terminal of that width, escape codes included."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"".join(size.to_bytes(2, sys.byteorder) for size in (50, columns, 0, 0)))
    with subprocess.Popen(
        (*MAIN, *args), stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT | {"TERM": "xterm"} | environment
    ):
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 2**16):
                written += chunk
        except OSError:  # Linux: the other side has closed
            pass
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_is_never_overrun(columns: int) -> None:
    for args in (("estimate", "mixtral-8x7b", "--gpu", "rtx-4090"), ("models",), ("inspect", "bart-base"), ("methods", "lora")):
        plain = re.sub(r"\x1b\[[0-9;]*m", "", in_terminal(*args, columns=columns))
        assert max(len(line) for line in plain.splitlines()) <= columns


def test_no_color_is_respected() -> None:
    shown = in_terminal("estimate", "gpt2", columns=80, NO_COLOR="1")
    codes = {int(code) for codes in re.findall(r"\x1b\[([0-9;]*)m", shown) for code in codes.split(";") if code}
    assert codes <= {0, 1}, "bold is no colour, all else is"


def test_the_console_script_is_this_main() -> None:
    script = Path(sys.executable).with_name("peftplan")
    if not script.exists():
        pytest.skip("not installed beside this interpreter")
    assert subprocess.run((script, "--version"), capture_output=True, text=True, check=True).stdout.startswith("peftplan")


@pytest.mark.parametrize(("modules", "frozen"), [((), True), (("torch",), False)])
def test_the_collector_looks_once_more_where_torch_is_loaded(modules: tuple[str, ...], frozen: bool) -> None:
    """Torch 2.15 prints 26 lines about leaks otherwise, in a process of its own that ends after a trace."""
    program = f"""
import gc, sys
before = gc.get_freeze_count()  # Python 3.12 freezes some itself
sys.modules.update(dict.fromkeys({modules!r}))
sys.argv = ["peftplan", "--version"]
from peftplan.cli import run
try:
    run()
except SystemExit:
    pass
print(gc.get_freeze_count() > before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(frozen)


@pytest.mark.parametrize(
    ("args", "left_out"), [(("--version",), True), (("rehearse", "--help"), False)], ids=["version", "rehearse"]
)
def test_plugins_of_pydantic_are_left_out_where_no_program_inherits_it(args: tuple[str, ...], left_out: bool) -> None:
    """pydantic looks for them in every installed package: 2 % of a start."""
    program = f"""
import os, sys
sys.argv = ["peftplan", *{args!r}]
from peftplan.cli import run
try:
    run()
except SystemExit:
    pass
print("PYDANTIC_DISABLE_PLUGINS" in os.environ)
"""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYDANTIC_DISABLE_PLUGINS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == str(left_out)
