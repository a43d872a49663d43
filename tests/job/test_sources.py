"""Where a model comes from: built-in names, paths, config objects, the cache, the Hub; and one clear line where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from peftplan.arch import hub
from peftplan.arch.configfile import MAX_CONFIG_BYTES
from peftplan.arch.hub import HubError
from peftplan.errors import InputError, MissingExtraError, PeftplanError, RefusedError, UnknownNameError
from peftplan.job.sources import kept, load, load_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 40,
}
# embedding and head 2·40·16; a layer: q, k, v, o 4·16·16, MLP 3·16·24, two norms 2·16; the last norm 16
LLAMA_PARAMETERS = 1280 + 2 * (1024 + 1152 + 32) + 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 500
    return text


# Built in


def test_a_built_in_model() -> None:
    arch = load("llama-2-70b")
    assert arch.num_parameters == 68_976_648_192  # printed on the model's card
    assert (arch.name, arch.task_type, arch.model_class) == ("llama-2-70b", "CAUSAL_LM", "LlamaForCausalLM")
    assert arch.source.startswith("built-in: meta-llama/Llama-2-70b-hf, verbatim config (")
    assert len(arch.blocks[0].layers) == 80


def test_it_is_read_once() -> None:
    assert load("llama-2-70b") is load("Llama_2-70B") is load("meta-llama/Llama-2-70b-hf")


def test_a_sibling_says_whose_shapes_it_has() -> None:
    arch = load("meta-llama/Llama-2-7b-chat-hf")
    assert arch.num_parameters == 6_738_415_616
    assert any("Llama-2-7b-chat-hf has the shapes of the built-in meta-llama/Llama-2-7b-hf" in note for note in arch.notes)
    assert not any("shapes of" in note for note in load("llama-2-7b").notes)


def test_another_task_and_number_of_labels() -> None:
    arch = load("roberta-base", task_type="SEQ_CLS", num_labels=5)
    # RobertaClassificationHead: dense 768·768 + 768, out_proj 768·5 + 5
    head = [m for m in arch.modules if m.name.startswith("classifier.")]
    assert [m.params for m in head] == [(("weight", (768, 768)), ("bias", (768,))), (("weight", (5, 768)), ("bias", (5,)))]
    assert load("roberta-base", task_type="SEQ_CLS") != arch


def test_a_weight_table_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from peftplan.job.sources import load\n"
        "assert load('mamba-130m').num_parameters == 129135360\n"
        "assert not load('mamba-130m').blocks\n"
        "try: load('mamba-130m', task_type='FEATURE_EXTRACTION')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingExtraError")
    assert "peftplan[trace]" in done.stdout


def test_a_built_in_name_is_found_without_reading_the_other_models() -> None:
    program = (
        "import sys\n"
        "from peftplan.job.sources import load\n"
        "load('llama-2-70b')\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'pydantic', 'click', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_weight_table_with_another_head_is_read_by_transformers() -> None:
    pytest.importorskip("transformers")
    arch = load("dinov2-small", task_type="IMAGE_CLS", num_labels=10)
    # Dinov2ForImageClassification: the class token beside the mean patch, 2·384 wide, on 10 labels
    assert next(m for m in arch.modules if m.name == "classifier").params == (("weight", (10, 768)), ("bias", (10,)))


def test_a_model_without_a_published_count_says_so() -> None:
    assert "not checked: no published parameter count was found" in load("opt-66b").notes


@pytest.mark.parametrize("num_labels", [0, -1, True, 1.5, "2", 2**40])
def test_num_labels_is_a_number(num_labels: Any) -> None:
    with pytest.raises(InputError, match="num_labels"):
        load("bert-base-uncased", task_type="SEQ_CLS", num_labels=num_labels)


def test_an_unknown_task() -> None:
    with pytest.raises(UnknownNameError, match="SEQ_CLS"):
        load("gpt2", task_type="SEQ_CLASS")


def test_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean llama-2-7b") as caught:
        load("lama-2-7b")
    assert "path" in one_line(caught.value)


# Paths


def test_a_file_and_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    by_file, by_folder = load(str(file)), load(tmp_path)
    assert by_file.num_parameters == by_folder.num_parameters == LLAMA_PARAMETERS
    assert by_file.source == by_folder.source == f"file {file}"
    assert load_config(file) == LLAMA


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path)
    assert load("mine").model_type == "llama"
    assert load("./gpt2").model_type == "llama"
    assert load("gpt2").model_type == "gpt2"


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON at line 1"),
        (b'{"model_type": "llama", ', "not JSON at line 1"),
        (b"model_type: llama", "not JSON"),
        (b'{"model_type": "ll\xff"}', "not UTF-8 at byte 18"),
        (json.dumps(LLAMA).encode("utf-16"), "not UTF-8"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'"llama"', "a JSON str, not an object"),
        (b"null", "not an object"),
        (b"{}", "model_type"),
        (b'{"model_type": 5}', "model_type"),
        (b'{"model_type": ""}', "model_type"),
        (b'{"model_type": null}', "model_type"),
        (b'{"model_type": "llama", "hidden_size": NaN}', "NaN"),
        (b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}", "hidden_size|digits"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"model_type": "llama", "x": "' + b"x" * MAX_CONFIG_BYTES + b'"}', "at most"),
        (b'{"peft_type": "LORA", "r": 8}', "peft adapter"),
        (b"<!DOCTYPE html><html></html>", "not JSON"),
        (b"PK\x03\x04\x00\x00", "not JSON"),
    ],
    ids=lambda value: value[:24] if isinstance(value, (bytes, str)) else None,
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize("field", [key for key in LLAMA if key not in ("architectures", "model_type")])
@pytest.mark.parametrize("value", [0, -1, 1.5, "16", True, [16], {}, 1e300, float("inf"), 2**60, None])
def test_a_damaged_dimension_is_one_line_that_names_it(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field) as caught:
        load({**LLAMA, field: value})
    one_line(caught.value)


@pytest.mark.parametrize("architectures", [None, [], [None], [5], "LlamaForCausalLM", {}, ["Nothing"], [[]]])
def test_odd_architectures_lead_to_the_usual_task(architectures: Any) -> None:
    assert load({**LLAMA, "architectures": architectures}).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("cut", range(0, len(json.dumps(LLAMA)), 7))
def test_a_truncated_file_is_one_line(tmp_path: Path, cut: int) -> None:
    (tmp_path / "config.json").write_bytes(json.dumps(LLAMA).encode()[:cut])
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    one_line(caught.value)


def test_infinity_is_read_where_a_config_may_hold_it(tmp_path: Path) -> None:
    """Mamba 2 configs hold `time_step_limit: [0.0, Infinity]`."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "time_step_limit": [0.0, float("inf")]}))
    assert load(tmp_path).num_parameters == LLAMA_PARAMETERS


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="name its base model"):
        load(tmp_path)


@pytest.mark.parametrize(
    "path", ["./nothing", "/nothing/here", "~/nothing-here", "nothing.json", "nothing\\here", "a\0b", "x" * 5000]
)
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(InputError) as caught:
        load(path)
    one_line(caught.value)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/../b", "a//b", "a/b/c", "-a/b", "a/b.git", "http://x/y", "a/b--c", "a b/c d"]
)
def test_what_is_no_hub_id_never_reaches_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch_config", lambda _: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError) as caught:
        load(name)
    one_line(caught.value)


# Config objects


def test_a_mapping() -> None:
    arch = load({**LLAMA, "_name_or_path": "me/tiny"})
    assert (arch.num_parameters, arch.name) == (LLAMA_PARAMETERS, "me/tiny")
    assert load(LLAMA).name == "llama"


@pytest.mark.parametrize("model", [None, 5, b"gpt2", ["gpt2"], object()])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(InputError, match="model"):
        load(model)


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b", "qwen2.5-0.5b", "flan-t5-small", "mixtral-8x7b", "bert-base-uncased"])
def test_a_transformers_config_gives_the_same_tensors(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = load_config(name)
    hf_config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    theirs, ours = load(hf_config), load(name)
    assert (theirs.modules, theirs.ties, theirs.blocks) == (ours.modules, ours.ties, ours.blocks)
    assert theirs.source == f"a {type(hf_config).__name__} object"


def test_num_labels_of_a_transformers_config() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(num_labels=3)
    assert load(config, task_type="SEQ_CLS").modules[-1].params == (("weight", (3, 768)), ("bias", (3,)))
    assert load(config, task_type="SEQ_CLS", num_labels=9).modules[-1].params == (("weight", (9, 768)), ("bias", (9,)))


def test_another_model_type_is_read_by_transformers() -> None:
    pytest.importorskip("transformers")
    arch = load(
        {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "architectures": ["MambaModel"]}
    )
    assert arch.model_class == "MambaModel"
    assert arch.blocks == ()


# Remote code


REMOTE = {"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}}


def test_native_code_is_used_and_a_note_says_so() -> None:
    arch = load({**LLAMA, **REMOTE})
    assert arch.num_parameters == LLAMA_PARAMETERS
    assert any("auto_map" in note for note in arch.notes)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_remote_code_is_refused_in_one_line(trust_remote_code: bool) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(RefusedError, match="never executed") as caught:
        load({**LLAMA, **REMOTE, "model_type": "my_llama"}, trust_remote_code=trust_remote_code)
    one_line(caught.value)


def test_an_unknown_model_type_without_code_of_its_own() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UnknownNameError, match="did you mean llama"):
        load({**LLAMA, "model_type": "lama"})


# The cache and the Hub


def cache(repo_id: str, config: dict[str, Any]) -> None:
    """Lay a config into the local cache as huggingface_hub does."""
    repo = Path(os.environ["HF_HUB_CACHE"]) / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "snapshots" / COMMIT / "config.json").write_text(json.dumps(config))


def test_the_cache_comes_before_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    cache("me/tiny", LLAMA)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    arch = load("me/tiny")
    assert (arch.num_parameters, arch.name, arch.source) == (LLAMA_PARAMETERS, "me/tiny", "Hub me/tiny, from the local cache")


def test_the_cache_folder_is_huggingface_hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    program = (
        "import huggingface_hub.constants as c; from peftplan.arch import hub;"
        "assert str(hub._cache_folder()) == c.HF_HUB_CACHE, (hub._cache_folder(), c.HF_HUB_CACHE)"
    )
    base = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "HUGGINGFACE_"))}
    for extra in (
        {},
        {"HF_HOME": str(tmp_path / "home")},
        {"XDG_CACHE_HOME": str(tmp_path)},
        {"HF_HUB_CACHE": str(tmp_path)},
        {"HUGGINGFACE_HUB_CACHE": str(tmp_path / "old")},
    ):
        done = subprocess.run([sys.executable, "-c", program], env={**base, **extra}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE") as caught:
        load("me/tiny")
    one_line(caught.value)
    with pytest.raises(HubError, match=r"similar built-in names: .*qwen3-8b"):
        load("Qwen/Qwen3-9B")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"peftplan\[hub\]"):
        load("me/tiny")


class Hub(BaseHTTPRequestHandler):
    """A stand-in that answers as huggingface.co does: the owner's name says how."""

    requests: list[tuple[str, str, str | None]]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        owner = self.path.split("/")[1]
        if owner == "api":  # huggingface_hub itself asks for its list of agents, once a day (utils/_detect_agent.py)
            self.send_error(404)
            return
        type(self).requests.append((self.command, self.path, self.headers.get("Authorization")))
        body = json.dumps(LLAMA).encode()
        status, headers = 200, {"ETag": '"0123"', "X-Repo-Commit": COMMIT}
        if owner == "gated-401":
            status, headers, body = 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "long\ntext"}, b"{}"
        elif owner == "gated-403":
            status, headers, body = 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        elif owner == "forbidden":
            status, headers, body = 403, {}, b"{}"
        elif owner == "missing":
            status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        elif owner == "private":
            status, headers, body = (
                401,
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."},
                b"{}",
            )
        elif owner == "wrong-token":
            status, headers, body = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        elif owner == "bare":
            status, headers, body = 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        elif owner == "teapot":
            status, headers, body = 418, {}, b"{}"
        elif owner == "page":
            body = b"<html>proxy login</html>"
        length = MAX_CONFIG_BYTES + 1 if owner == "huge" else len(body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "Connection": "close"}.items():
            self.send_header(name, value.replace("\n", " "))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_test")
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_config_from_the_hub_is_the_only_file_and_is_kept(stand_in: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    arch = load("me/tiny")
    assert (arch.num_parameters, arch.source) == (LLAMA_PARAMETERS, "Hub me/tiny")
    assert {path for _, path, _ in stand_in.requests} == {"/me/tiny/resolve/main/config.json"}
    assert {token for _, _, token in stand_in.requests} == {"Bearer hf_secret_of_the_test"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load("me/tiny").source == "Hub me/tiny, from the local cache"


def test_a_built_in_model_never_asks_the_hub(stand_in: type[Hub]) -> None:
    load("meta-llama/Llama-2-13b-hf")
    assert stand_in.requests == []


@pytest.mark.parametrize(
    ("repo_id", "words"),
    [
        ("gated-401/x", "gated: .*HF_TOKEN"),
        ("gated-403/x", "gated: .*HF_TOKEN"),
        ("forbidden/x", "gated"),
        ("missing/x", "no such model"),
        ("private/x", "no such model .*private"),
        ("wrong-token/x", "check HF_TOKEN"),
        ("bare/x", "no config.json"),
        ("teapot/x", "HTTP status 418"),
        ("huge/x", "at most"),
        ("page/x", "not JSON at line 1"),
    ],
)
def test_what_the_hub_refuses_is_one_line(stand_in: type[Hub], repo_id: str, words: str) -> None:
    with pytest.raises(PeftplanError, match=words) as caught:
        load(repo_id)
    text = one_line(caught.value)
    assert repo_id in text
    assert "secret" not in text


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached") as caught:
        load("me/tiny")
    one_line(caught.value)


COUNTED = """
import sys
import peftplan

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
result = peftplan.estimate({file!r}, method="lora", batch_size=64, gpu="2GiB")
result.to_dict()
print(len(result.advice["2GiB"].changes), opened.count({file!r}))
"""


def test_a_config_is_read_once(tmp_path: Path) -> None:
    """By an estimate with advice, which prepares the job some forty times with one option changed."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(load_config("qwen2.5-0.5b")))
    done = subprocess.run([sys.executable, "-c", COUNTED.format(file=str(file))], capture_output=True, text=True, check=True)
    changes, reads = map(int, done.stdout.split())
    assert changes > 0
    assert reads == 1


def test_a_config_that_its_caller_changes_in_place_is_another_model() -> None:
    """Also in a nested value that no `Architecture` has: steps are shared between jobs of equal configs."""
    config: dict[str, Any] = load_config("llama-3.1-8b") | {"rope_scaling": {"factor": 8.0}}
    first = kept(load(config), config)
    assert kept(load(config), dict(config)) is first
    config["rope_scaling"]["factor"] = 4.0
    assert kept(load(config), config) is not first
