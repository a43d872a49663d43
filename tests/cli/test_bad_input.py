"""Bad input: one line on stderr that names the field, the value and what is accepted; exit 2; nothing on stdout."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import peftplan
from tests.cli.run import HERE, Done, run

TINY = json.loads((HERE / "tiny.json").read_text(encoding="utf-8"))


def refused(*args: str) -> str:
    """The one line that a refused command prints."""
    done = run(*args)
    assert done == Done(2, "", done.err)
    assert done.err.count("\n") == 1
    assert done.err.startswith("peftplan: ")
    assert len(done.err) <= 1000
    return done.err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        # a field, the value, and what is accepted or near
        ("estimate lama-2-7b", ["MODEL", "'lama-2-7b'", "did you mean llama-2-7b", "built-in names", "config.json"]),
        ("estimate owner/nothing", ["owner/nothing", "HF_HUB_OFFLINE"]),
        ("inspect nothing", ["MODEL", "'nothing'"]),
        ("estimate ./nothing.json", ["MODEL", "'./nothing.json'", "no such file"]),
        ("estimate gpt2 --method lra", ["method", "'lra'", "did you mean lora", "qlora"]),
        ("methods lra", ["NAME", "'lra'", "did you mean lora"]),
        ("estimate gpt2 --dtype fp31", ["dtype", "'fp31'", "bf16, fp16, fp32"]),
        ("estimate gpt2 --adapter-dtype int8", ["--adapter-dtype", "'int8'", "bf16, fp16, fp32"]),
        ("estimate gpt2 --compute-dtype int8 --quant nf4", ["--compute-dtype", "'int8'", "bf16, fp16, fp32"]),
        ("inspect gpt2 --dtype fp31", ["dtype", "'fp31'", "bf16, fp16, fp32"]),
        ("estimate gpt2 --optim adamw_trch", ["optim", "'adamw_trch'", "adamw_torch"]),
        ("estimate gpt2 --quant nf5", ["quant", "'nf5'", "nf4", "int8"]),
        ("estimate gpt2 --gpu rtx-4091", ["gpu", "'rtx-4091'", "rtx-4090"]),
        ("estimate gpt2 --torch main", ["torch: 'main'", "a version such as 2.10"]),
        ("estimate gpt2 --transformers v5", ["transformers: 'v5'", "a version such as 5.3"]),
        ("estimate gpt2 --gpu 24", ["gpu", "'24'", "peftplan gpus", "24GiB"]),
        ("estimate gpt2 --gpu t4,rtx-4091", ["gpu", "'rtx-4091'", "rtx-4090"]),
        # what was taken, or said of another option
        ("estimate gpt2 --gradient-checkpointing=maybe", ["--gradient-checkpointing: 'maybe' is not valid; accepted: true"]),
        ("estimate gpt2 --gradient-checkpointing=", ["--gradient-checkpointing: '' is not valid; accepted: true, false"]),
        ("estimate gpt2 --gpu t4 --require-fit=perhaps", ["--require-fit: 'perhaps' is not valid; accepted: true, false"]),
        ("compare gpt2 --r abc", ["--r must be a whole number (got 'abc')"]),
        ("compare gpt2 --r 0 --gpu t4", ["--r must be at least 1 (got 0)"]),
        ("compare gpt2 --method ,", ["--method: '' is not valid"]),
        ("fit gpt2 --gpu t4 --methods lroa", ["--methods: 'lroa' is not valid; did you mean lora"]),
        ("methods zzz", ["NAME: 'zzz' is not valid"]),
        ("estimate gpt2 --gpu 8x", ["--gpu: '8x' is not valid; accepted: 1 to 131,072 of a card, such as 8xh100-80gb"]),
        ("estimate gpt2 --gpu -1xt4", ["--gpu: '-1xt4' is not valid; accepted: 1 to 131,072 of a card"]),
        ("estimate gpt2 --gpu 2.5xt4", ["--gpu: '2.5xt4' is not valid; accepted: 1 to 131,072 of a card"]),
        ("estimate --config=", ["--config must be a path or a list of paths (got '')"]),
        ("estimate gpt2 --gpu 0GiB", ["gpu", "'0GiB'", "above zero"]),
        ("estimate gpt2 --optim adam", ["optim", "makes no adam", "did you mean adamw_"]),
        ("estimate gpt2 --require-fit", ["--require-fit", "--gpu"]),
        ("estimate gpt2 --explain --format csv", ["--explain", "text", "csv"]),
        ("replay log.json --require-fit", ["--require-fit", "--capacity"]),
        (f"estimate gpt2 --gpu {'9' * 400}GiB", ["gpu", "at most"]),
        ("estimate gpt2 --format xml", ["format", "'xml'", "csv, json, markdown, table"]),
        ("models --format xml", ["format", "'xml'", "csv, json, markdown, table"]),
        ("estimate gpt2 --rang 4", ["no such option: --rang", "--help"]),
        ("estimate gpt2 --optimm sgd", ["--optimm", "did you mean --optim"]),
        ("estimates gpt2", ["command", "'estimates'", "did you mean estimate"]),
        ("estimate", ["MODEL"]),
        ("estimate gpt2 llama-2-7b", ["llama-2-7b"]),
        ("estimate gpt2 --r", ["--r"]),
        # numbers
        ("estimate gpt2 --r 0", ["--r must be at least 1 (got 0)"]),
        ("estimate gpt2 --r abc", ["--r must be a whole number (got 'abc')"]),
        ("estimate gpt2 --r 1e30", ["--r must be a whole number (got '1e30')"]),
        ("estimate gpt2 --r 99999999999", ["--r must be at most", "(got 99999999999)"]),
        ("estimate gpt2 --batch-size -1", ["--batch-size must be at least 1 (got -1)"]),
        ("estimate gpt2 --batch-size 1.5", ["--batch-size must be a whole number (got '1.5')"]),
        ("estimate gpt2 --seq-len 0", ["--seq-len must be at least 1 (got 0)"]),
        (
            "estimate gpt2 --method prompt-tuning --num-virtual-tokens 8 --seq-len 1020",
            ["--seq-len: 1020 is not valid; accepted: up to 1016, the model's 1024 positions less 8 virtual tokens"],
        ),
        # a negative number to new releases of pydantic, none to old ones
        ("estimate gpt2 --gpus 2 --sub-group-size 0_-5", ["--sub-group-size must be", "(got '0_-5')"]),
        ("estimate gpt2 --num-labels 0", ["--num-labels must be at least 1 (got 0)"]),
        ("inspect gpt2 --num-labels many", ["--num-labels", "'many'", "a whole number"]),
        ("estimate gpt2 --lora-dropout 2", ["--lora-dropout must be below 1.0 (got 2)"]),
        ("estimate gpt2 --layers-to-transform one,two", ["--layers-to-transform: 'one,two'", "whole numbers"]),
        ("estimate gpt2 --rank-pattern {", ["--rank-pattern: '{'", "JSON"]),
        ("estimate gpt2 --rank-pattern [1]", ["--rank-pattern must be a mapping", "[1]"]),
        ('estimate gpt2 --rank-pattern {"(":4}', ["--rank-pattern", "regular expression"]),
        # closed sets
        ("estimate gpt2 --trainer hf", ["trainer: 'hf'", "plain", "trl"]),
        ("estimate gpt2 --autocast tf32", ["autocast: 'tf32'", "none", "bf16"]),
        ("estimate gpt2 --attn-implementation flash", ["--attn-implementation: 'flash'", "sdpa", "flash_attention_2"]),
        ("estimate gpt2 --loss mse", ["loss: 'mse'", "auto", "liger"]),
        ("estimate gpt2 --bias some", ["bias: 'some'", "none", "lora_only"]),
        ("estimate gpt2 --task-type CHAT", ["--task-type: 'CHAT'", "CAUSAL_LM"]),
        ("estimate gpt2 --engine guess", ["engine: 'guess'", "analytic, trace"]),
        # methods and their fields
        ("estimate gpt2 --set rang=4", ["--set rang is not an option of lora", "did you mean --rank", "accepted", "r,"]),
        ("estimate gpt2 --set r", ["--set", "'r'", "FIELD=VALUE"]),
        ("estimate gpt2 --set r=four", ["--set r must be a whole number (got 'four')"]),
        ("estimate gpt2 --set model=gpt2-xl", ["--set", "'model=gpt2-xl'", "FIELD=VALUE"]),
        ("estimate gpt2 --set peft_config=1", ["--set", "'peft_config=1'", "FIELD=VALUE"]),
        ("estimate gpt2 --method prefix-tuning", ["--num-virtual-tokens is missing: peft has no default for it"]),
        ("estimate gpt2 --method full --r 8", ["--r is not an option of full; it has none"]),
        ("estimate gpt2 --method bitfit --target-modules q_proj", ["--target-modules is not an option of bitfit; it has none"]),
        ("estimate qwen2-vl-2b-instruct --method ia3", ["peftplan: --set feedforward_modules: peft has no default", "name them"]),
        ("estimate llama-2-7b --method vera --target-modules embed_tokens", ["embed_tokens is of class Embedding;"]),
        ("check --sample 0", ["--sample must be at least 1 (got 0)"]),
        ("check --seed x", ["--seed must be a whole number (got 'x')"]),
        ("rehearse --timeout x -- true", ["--timeout must be a number (got 'x')"]),
        ("explain-oom", ["FILE is missing"]),
        ("completion", ["SHELL is missing", "bash, zsh, fish"]),
        ("compare gpt2 opt-125m", ["no place for opt-125m", "`peftplan sweep A,B` takes several models"]),
        ("estimate gpt2 --method prefix-tuning --num-virtual-tokens 4 --r 8", ["--r is not an option of prefix-tuning"]),
        # targets: near names are shown
        ("llama-2-7b", ["command", "it is a model; did you mean peftplan estimate llama-2-7b?"]),
        ("tiny.json", ["command", "it is a file; did you mean peftplan estimate --config tiny.json?"]),
        ("estimate run.py", ["MODEL", "a training config is read by --config run.py"]),
        ("estimate llama-2-7b --quant 4bit", ["--quant", "did you mean nf4? accepted: awq"]),
        ("estimate llama-2-7b --gpu 24", ["--gpu", "did you mean 24GB? accepted"]),
        ("estimate llama-2-7b --gpu 0", ["--gpu: '0' is not valid; accepted"]),
        ("estimate llama-2-7b --gpu 1650", ["--gpu: '1650' is not valid; accepted"]),
        ("estimate llama-2-7b --gpu rtx-4090x2", ["--gpu", "did you mean 2xrtx-4090? accepted"]),
        ("estimate llama-2-7b --target-modules all", ["did you mean all-linear? it has down_proj", "up_proj, v_proj"]),
        ("estimate llama-2-7b --target-modules q_pro", ["--target-modules", "'q_pro'", "near: q_proj"]),
        ("estimate llama-2-7b --target-modules q_pro,v_pro", ["--target-modules: 'q_pro,v_pro' is not valid"]),
        ("configs nosuch", ["PATH: cannot read 'nosuch': no such file or folder"]),
        ("estimate llama-2-7b --epochs 3", ["no such option: --epochs (see --help)"]),
        ("estimate llama-2-7b --batchsize 3", ["did you mean --batch-size"]),
        ("inspect llama-2-7b --match q_pro", ["--match", "'q_pro'", "near: q_proj"]),
        ("estimate llama-2-7b --target-modules (", ["--target-modules: '('", "regular expression"]),
        ("estimate mixtral-8x7b --target-modules (", ["--target-modules: '('", "regular expression"]),
        ("estimate llama-2-7b --exclude-modules (", ["--exclude-modules: '('", "regular expression"]),
        ("estimate llama-2-7b --layers-to-transform 99", ["--layers-to-transform: (99,)", "0 to 31"]),
        ("estimate llama-2-7b --modules-to-save lm_haed", ["--modules-to-save: 'lm_haed'", "near: lm_head"]),
        ("estimate llama-2-7b --target-modules norm", ["--target-modules: model.norm", "RMSNorm"]),
        # combinations that the libraries refuse, or that say two things at once
        ("estimate mamba-130m", ["--target-modules: peft refuses out_proj in mamba", "--exclude-modules=out_proj"]),
        ("estimate whisper-tiny --method p-tuning --num-virtual-tokens 4",
         ["KeyError: None", "text, which WhisperForConditionalGeneration does not read", "accepted: other methods"]),
        ("estimate bert-base-cased --method p-tuning --num-virtual-tokens 4", ["None", "MASKED_LM", "accepted: SEQ_CLS"]),
        ("estimate llama-2-7b --method full --quant nf4", ["quant", "nf4", "in full", "none"]),
        ("estimate llama-2-7b --method qlora --quant none", ["quant", "'none'", "accepted"]),
        ("estimate llama-2-7b --double-quant", ["--double-quant: ", "nothing is quantized"]),
        ("estimate llama-2-7b --kbit-prepare", ["--kbit-prepare: ", "nothing is quantized"]),
        ("estimate llama-2-7b --quant-bits 4", ["--quant-bits: ", "nothing is quantized"]),
        ("estimate llama-2-7b --quant int8 --double-quant", ["--double-quant", "int8", "nf4"]),
        ("estimate llama-2-7b --quant nf4 --quant-bits 3", ["--quant-bits: 3", "nf4 accepts 4"]),
        ("estimate llama-2-7b --quant mxfp4", ["mxfp4", "dequantize"]),
        ("estimate llama-2-7b --optim galore_adamw", ["--optim-target-modules", "galore_adamw"]),
        ("estimate llama-2-7b --optim-args lr", ["--optim-args: 'lr'", "key=value"]),
        ("estimate bloom-560m --attn-implementation sdpa", ["--attn-implementation", "sdpa", "eager"]),
    ],
)  # fmt: skip
def test_what_is_said(command: str, expected: list[str]) -> None:
    line = refused(*command.split())
    assert [text for text in expected if text not in line] == [], line


def test_a_models_config_is_a_model(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert f"it is a file; did you mean peftplan estimate {config}?" in refused(str(config))


@pytest.mark.parametrize("args", [("estimate", ""), ("estimate", " "), ("estimate", "\x00"), ("estimate", "a\nb")])
def test_odd_names(args: tuple[str, ...]) -> None:
    assert refused(*args).startswith("peftplan: MODEL: ")


@pytest.mark.parametrize(
    ("args", "out"),
    [
        (("models", "siglip"), "0 models\n"),
        (("models", "siglip", "--format", "json"), "[]\n"),
        (("models", "siglip", "--format", "csv"), ""),
        (("models", "\n", "--format", "markdown"), "0 models\n"),
        (("gpus", "rtx-9999"), "0 cards\n"),
        (("gpus", "rtx-9999", "--format", "json"), "[]\n"),
    ],
)
def test_a_search_without_a_result_is_no_error(args: tuple[str, ...], out: str) -> None:
    assert run(*args) == Done(0, out, "")


@pytest.mark.parametrize("name", ["xyzzy", "qwerty", "q", "hello-there"])
def test_nonsense_is_near_nothing(name: str) -> None:
    for args in (("estimate", name), ("estimate", "gpt2", "--method", name), ("estimate", "gpt2", "--optim", name)):
        done = run(*args)
        assert done.code == 2
        assert "did you mean" not in done.err


def test_a_misspelt_keyword_of_the_setup_is_suggested() -> None:
    with pytest.raises(peftplan.UnknownNameError, match="did you mean batch_size"):
        peftplan.estimate("llama-2-7b", batchsize=3)
    with pytest.raises(peftplan.UnknownNameError, match="did you mean method"):
        peftplan.estimate("llama-2-7b", methd="lora")
    with pytest.raises(peftplan.UnknownNameError, match="did you mean strategy"):
        peftplan.estimate("llama-2-7b", startegy="fsdp2", gpus=2)


def test_the_version_is_that_of_the_distribution() -> None:
    assert peftplan.__version__ == version("peftplan")


def test_an_empty_text_is_no_default() -> None:
    for option in ("--target-modules", "--peft-config", "--gpu", "--optim", "--dtype", "--r", "--method"):
        assert option in refused("estimate", "llama-2-7b", option, "")


def config(tmp_path: Path, content: bytes | str | dict[str, Any]) -> str:
    """A config.json with that content."""
    path = tmp_path / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps(TINY)[:60], ["not JSON", "line 1"]),
        ("", ["not JSON"]),
        ("weights", ["not JSON"]),
        (b"\xff\xfe{}", ["UTF-8"]),
        (b"{}" + b" " * (10 * 2**20), ["at most", "bytes"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}", ["digits"]),
        ("[]", ["list"]),
        ("{}", ["model_type"]),
        ({**TINY, "model_type": 7}, ["model_type", "7"]),
        ({key: value for key, value in TINY.items() if key != "hidden_size"}, ["hidden_size", "must state it"]),
        ({**TINY, "hidden_size": None}, ["hidden_size", "must state it"]),
        ({**TINY, "hidden_size": "64"}, ["hidden_size", "'64'", "whole number"]),
        ({**TINY, "hidden_size": -64}, ["hidden_size", "-64", "whole number from 1"]),
        ({**TINY, "hidden_size": 2**40}, ["hidden_size", "1099511627776", "to 16777216"]),
        ({**TINY, "hidden_size": float("inf")}, ["hidden_size", "inf", "whole number"]),
        ({**TINY, "hidden_size": float("nan")}, ["NaN"]),
        ({**TINY, "hidden_size": 65}, ["hidden_size", "65", "multiple"]),
        ({**TINY, "num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000", "to 4096"]),
        ({**TINY, "num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({**TINY, "tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'", "true or false"]),
        ({"peft_type": "LORA", "r": 8}, ["adapter", "base model"]),
    ],
)  # fmt: skip
def test_a_damaged_config(tmp_path: Path, content: bytes | str | dict[str, Any], expected: list[str]) -> None:
    for command in ("estimate", "inspect"):
        line = refused(command, config(tmp_path, content))
        assert [text for text in expected if text not in line] == [], line


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")  # which knows the model types that are not built in
    own = {"model_type": "their-own", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    for switch in ((), ("--trust-remote-code",)):
        assert "never executed" in refused("estimate", config(tmp_path, own), *switch)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["--peft-config: ", "cannot read"]),
        ("{", ["--peft-config: ", "not a JSON file"]),
        (b"\xff\xfe", ["--peft-config: ", "not a JSON file"]),
        ('{"peft_type": "LORA", "x": ' + "[" * 100_000, ["--peft-config: ", "not a JSON file"]),
        ("[]", ["--peft-config: ", "peft_type"]),
        ("{}", ["--peft-config: ", "peft_type"]),
        ('{"peft_type": "LORA"}' + " " * 2**20, ["--peft-config: ", "at most"]),
        ('{"peft_type": "LORA", "r": "abc"}', ["r must be a whole number (got 'abc')"]),
        ('{"peft_type": "LORA", "r": NaN}', ["r: nan"]),
        ('{"peft_type": "LORA", "modules_to_save": "("}', ["modules_to_save: ", "regular expression"]),
    ],
)
def test_a_damaged_adapter_config(tmp_path: Path, content: bytes | str | None, expected: list[str]) -> None:
    path = tmp_path / "adapter_config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("estimate", "llama-2-7b", "--peft-config", str(path))
    assert [text for text in expected if text not in line] == [], line


def test_an_endless_file_is_not_read_to_its_end() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("no /dev/zero here")
    for command in (("estimate", "/dev/zero"), ("estimate", "gpt2", "--peft-config", "/dev/zero")):
        assert "'/dev/zero'" in refused(*command)


def test_a_misspelled_peft_type_is_refused_without_peft(tmp_path: Path) -> None:
    """It took 26 seconds of imports, and the error did not name the option."""
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "LROA"}')
    line = refused("estimate", "gpt2", "--peft-config", str(path))
    assert "--peft-config: peft_type: 'LROA' is not valid; did you mean LORA? accepted: ADALORA, " in line


def test_a_launch_file_is_not_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("[" * 100_000)
    assert "it is nested too deeply" in refused("estimate", "gpt2", "--gpus", "2", "--deepspeed", str(path))
