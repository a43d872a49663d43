"""`peftplan configs`: a line for each file, no network, no crash."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

import peftplan
from peftplan.planning import configs as planning_configs
from tests.cli.run import run

QLORA = (
    "base_model: llama-3.1-8b\nadapter: lora\nmicro_batch_size: 1\nlora_r: 8\nlora_target_linear: true\nlora_mlp_kernel: false\n"
)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(QLORA)
    (tmp_path / "b.yml").write_text(QLORA + "rl: grpo\n")
    (tmp_path / "c.yml").write_text("name: workflow\n")
    (tmp_path / "d.yml").write_text("base_model: somebody/else\nadapter: lora\nmicro_batch_size: 1\n")
    (tmp_path / "e.yml").write_text("a: [\n")
    done = run("configs", str(tmp_path), "--gpu", "a100-80gb", "--format", "json")
    assert done.code == 0
    a, b, c, d, e = json.loads(done.out)
    assert (a["tool"], a["model"], a["trainable_parameters"], a["verdict"]) == ("axolotl", "llama-3.1-8b", 20_971_520, "fits")
    assert (b["peak_allocated"], b["verdict"], b["unsupported"], b["trainable_parameters"]) == (
        None,
        "unknown",
        ["rl"],
        20_971_520,
    )
    assert (c["tool"], c["error"]) == ("other", "not a training config")
    assert "--online" in d["error"]
    assert "e.yml" in e["error"]
    shown = " ".join(run("configs", str(tmp_path), "--gpu", "a100-80gb").out.split())
    assert "3 training configs: 2 counted, 1 with a peak, 1 exact; 2 other files" in shown


def test_a_misspelled_key_that_the_tool_drops(tmp_path: Path) -> None:
    """axolotl trains without it, so its peak is exact: the row says what the person may have meant."""
    (tmp_path / "a.yml").write_text(QLORA + "sequnce_len: 4096\n")
    (row,) = json.loads(run("configs", str(tmp_path), "--format", "json").out)
    assert row["peak_allocated"]
    assert not row["unsupported"]
    (remark,) = row["misspelled"]
    assert remark.startswith("sequnce_len has no effect: axolotl leaves it out; did you mean sequence_len")
    assert remark in " ".join(run("configs", str(tmp_path)).out.split())


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """A folder of examples had six rows with `train.sh`, and notes that could be of any."""
    for folder in ("dpo", "kto"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lora.yml").write_text(QLORA + "rl: grpo\n")
    (tmp_path / "kto" / "full.yml").write_text(QLORA)
    shown = run("configs", str(tmp_path)).out
    assert [line.split()[0] for line in shown.splitlines()[2:5]] == ["dpo/lora.yml", "full.yml", "kto/lora.yml"]
    assert "kto/lora.yml: unsupported: " in shown


def test_a_narrow_table_keeps_its_notes_and_counts_launch_files(tmp_path: Path) -> None:
    """The reason stood in a column that 80 columns left out, and a launch file was a row of dashes."""
    (tmp_path / "a.yml").write_text(QLORA + "rl: grpo\n")
    (tmp_path / "b.yml").write_text("base_model: somebody/else\nadapter: lora\nmicro_batch_size: 1\nlora_mlp_kernel: true\n")
    (tmp_path / "c.yml").write_text("distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 4\n")
    narrow = run("configs", str(tmp_path), "--gpu", "l4", columns=80).out
    assert "a.yml: unsupported: rl\n" in narrow
    assert "b.yml: somebody/else is neither built in nor in the local cache;" in narrow
    assert narrow.endswith("1 launch file\n")
    assert "c.yml" not in narrow
    wide = run("configs", str(tmp_path), "--gpu", "l4", columns=140).out
    assert "a.yml:" not in wide
    assert "unsupported: rl" in wide
    alone = run("configs", str(tmp_path / "c.yml"), columns=80).out
    assert "c.yml: a launch file without a model" in alone


def test_a_path_that_is_not_there() -> None:
    assert run("configs", "/nowhere/at/all").code == 2


def test_a_name_that_no_file_can_have_is_bad_input() -> None:
    """The system's own error was taken for a full disk."""
    with pytest.raises(peftplan.InputError, match="File name too long"):
        list(peftplan.configs("a" * 300))


def test_files_are_counted_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.yml").write_text(QLORA)
    monkeypatch.setattr(planning_configs, "MOST_FILES", 2)
    monkeypatch.setattr(planning_configs, "entry", None)
    with pytest.raises(peftplan.InputError, match="folders of at most 2 files"):
        list(peftplan.configs(tmp_path))
    monkeypatch.setattr(planning_configs, "MOST_FILES", 3)
    monkeypatch.setattr(planning_configs, "entry", lambda file, **_: file.name)
    assert list(peftplan.configs(tmp_path)) == ["a.yml", "b.yml", "c.yml"]


def test_processes_share_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.yml").write_text(QLORA)
    monkeypatch.setattr(planning_configs, "FILES_OF_PROCESS", 2)
    alone = list(peftplan.configs(tmp_path))
    monkeypatch.setattr(planning_configs, "_in_processes", Mock(wraps=planning_configs._in_processes))
    assert list(peftplan.configs(tmp_path, processes=8)) == alone
    assert planning_configs._in_processes.call_args.args[2] == 2  # type: ignore[attr-defined]
    for other in (0, 1.5, "2"):
        with pytest.raises(peftplan.InputError, match=r"processes: .* is not valid"):
            peftplan.configs(tmp_path, processes=other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--gpu", "nosuch"), "--gpu: 'nosuch' is not valid"),
        (("--gpu", "0xl4"), "--gpu: '0xl4' is not valid"),
        (("--gpu", "2xl4,4xt4"), "--gpu: a file has one verdict"),
        (("--gpu", "l4,t4"), "--gpu: a file has one verdict"),
        (("--engine", "no"), "--engine: 'no' is not valid"),
        (("--tool", "axolotll"), "did you mean axolotl?"),
    ],
)
def test_options_that_suit_no_file(tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    """One line, rather than the same error in every row."""
    (tmp_path / "a.yml").write_text(QLORA)
    done = run("configs", str(tmp_path), *options)
    assert done.code == 2
    assert expected in done.err


def test_a_file_with_a_wrong_value_has_its_tool(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(QLORA.replace("lora_r: 8", "lora_r: -16"))
    (row,) = json.loads(run("configs", str(tmp_path), "--format", "json").out)
    assert row["tool"] == "axolotl"
    assert "a.yml:4: lora_r: -16 is not valid" in row["error"]


def test_a_card_that_says_how_many_there_are_wins_over_the_command_in_the_comments(tmp_path: Path) -> None:
    """The recipe's header launches 2 processes; the card says 8, whose shards are smaller."""
    command = "# tune run --nproc_per_node 2 lora_finetune_distributed --config a.yml\n"
    recipe = "model:\n  _component_: torchtune.models.llama3_1.lora_llama3_1_8b\n  lora_attn_modules: [q_proj]\n"
    file = tmp_path / "a.yml"
    file.write_text(command + recipe + "checkpointer:\n  checkpoint_dir: /tmp/Llama-3.1-8B\n")
    entries = [peftplan.configs(file, gpu=gpu)[0] for gpu in ("a100-80gb", "2xa100-80gb", "8xa100-80gb")]
    assert [entry.error for entry in entries] == [None, None, None]
    alone, two, eight = (entry.peak_allocated or 0 for entry in entries)
    assert alone == two > eight > 0


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """They were silently counted among other files; a line break in a name broke the table."""
    (tmp_path / "a\nb.yml").write_text(QLORA)
    (tmp_path / "twice.yml").write_text(f"{QLORA}lora_r: 9\n")
    (tmp_path / "workflow.yml").write_text("on: push\n")
    done = run("configs", str(tmp_path))
    assert "a b.yml" in done.out
    assert "cannot be read: twice.yml (--format json says why)\n" in done.out


def test_a_file_without_a_peak_bounds_nothing(tmp_path: Path) -> None:
    """The model has no formula: that evaluation has more rows does not matter."""
    file = tmp_path / "a.yml"
    training = "model_name_or_path: zai-org/GLM-4.6V-Flash\nuse_peft: true\nlora_target_modules: all-linear\nmax_length: 512\n"
    file.write_text(f"{training}per_device_train_batch_size: 1\nper_device_eval_batch_size: 8\neval_strategy: steps\n")
    (entry,) = json.loads(run("configs", str(file), "--format", "json").out)
    assert (entry["peak_allocated"], entry["bound"]) == (None, None)
    assert entry["error"].startswith("activations of model type glm46v")
    assert entry["unsupported"] == ["per_device_eval_batch_size"]
