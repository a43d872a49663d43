"""Files of every kind that a command reads: valid ones, damaged in values, text or bytes, and what is no file."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from peftplan.accuracy.jsonl import digest
from peftplan.arch import catalogue
from peftplan.datafiles import DATA
from peftplan.methods import METHODS, OTHER_PEFT_TYPES, config_class
from tools.fuzz.values import ABSURD, json_value, nest

SNAPSHOT = Path(__file__).parents[2] / "tests" / "allocator" / "data" / "qlora_step.pickle.gz"
NAMES = ("config.json", "a b.json", "é.json", "x\ny.json", "[x](y)|=1.json", "-r.json", "noext", "long" * 40 + ".json")


def damaged(dice: Random, value: Any, *, changes: int) -> Any:
    """The same JSON with some values replaced, dropped, or moved to another key."""
    value = json.loads(json.dumps(value))
    for _ in range(changes):
        holder = value
        while isinstance(holder, (dict, list)) and holder:
            key = dice.choice(sorted(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
            inner = holder[key]
            if isinstance(inner, (dict, list)) and inner and dice.random() < 0.7:
                holder = inner
                continue
            if isinstance(holder, dict) and dice.random() < 0.2:
                del holder[key]
            elif dice.random() < 0.3:
                holder[key] = holder[dice.choice(list(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))]
            elif isinstance(inner, int) and dice.random() < 0.5:
                holder[key] = dice.choice([0, 1, -1, inner + 1, inner * 3, inner * 2**10, 2**40])
            else:
                holder[key] = json_value(dice)
            break
    return value


def mangled(dice: Random, content: bytes) -> bytes:
    """Bytes cut, flipped, repeated, or put in a wrong encoding."""
    how = dice.randrange(8)
    if how == 0:
        return content[: dice.randrange(len(content) + 1)]
    if how == 1:
        return b"\xef\xbb\xbf" + content
    if how == 2:
        return content.decode(errors="replace").encode("utf-16")
    if how == 3:
        return content + content
    if how == 4:
        return dice.choice([b"[", b'{"a":', b'{"model_type":', b"("]) * dice.choice([10, 1000, 50_000])
    if how == 5:
        return dice.randbytes(dice.choice([0, 1, 9, 1000]))
    flipped = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        if flipped:
            flipped[dice.randrange(len(flipped))] = dice.randrange(256)
    return bytes(flipped)


@cache
def _configs() -> tuple[dict[str, Any], ...]:
    return tuple(dict(entry.facts()["config"]) for entry in catalogue.models())


@cache
def _lines(*parts: str) -> tuple[dict[str, Any], ...]:
    files = sorted(DATA.joinpath(*parts[:-1]).glob(parts[-1]))
    return tuple(json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


@cache
def _baseline() -> dict[str, Any]:
    whole = json.loads((DATA / "runs" / "baseline.json").read_text(encoding="utf-8"))
    return {**whole, "engines": {engine: dict(list(entries.items())[:3]) for engine, entries in whole["engines"].items()}}


@cache
def _snapshot() -> dict[str, Any]:
    whole = pickle.loads(gzip.decompress(SNAPSHOT.read_bytes()))
    traces = [trace[:60] for trace in whole["device_traces"]]
    return {"segments": whole["segments"][:3], "device_traces": traces, "allocator_settings": whole.get("allocator_settings", {})}


LOG = {
    "format": "peftplan-events",
    "schema_version": 1,
    "title": "tiny",
    "events": [
        {
            "kind": "alloc",
            "id": 0,
            "bytes": 1024,
            "phase": "load",
            "op": "empty",
            "module": "m",
            "category": "weights",
            "name": "w",
        },
        {"kind": "alloc", "id": 1, "bytes": 2**24, "phase": "forward"},
        {"kind": "free", "id": 0, "phase": "step"},
        {"kind": "empty_cache", "id": 0},
        {"kind": "mark", "id": 0, "op": "end"},
    ],
}


def config(dice: Random) -> Any:
    """A config.json."""
    return damaged(dice, dice.choice(_configs()), changes=dice.choice([0, 1, 1, 2, 3]))


def adapter(dice: Random) -> Any:
    """An adapter_config.json of any type."""
    method = dice.choice([method for method in METHODS.values() if method.peft_type])
    fields: dict[str, Any] = {"peft_type": method.peft_type, "base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}
    for name in dice.choices(sorted(config_class(method).model_fields), k=dice.randint(0, 4)):
        fields[name] = dice.choice([None, 1, 4, 0.1, True, "none", ["q_proj"], "all-linear", {}, json_value(dice)])
    if dice.random() < 0.1:
        fields["peft_type"] = dice.choice(OTHER_PEFT_TYPES)
    return damaged(dice, fields, changes=dice.choice([0, 0, 1, 2]))


def _records(dice: Random) -> bytes:
    lines = []
    for _ in range(dice.randint(1, 2)):
        record = damaged(dice, dice.choice(_lines("runs", "[bdfmpv]*.jsonl")), changes=dice.choice([0, 1, 2]))
        if isinstance(record, dict) and dice.random() < 0.9:
            record["digest"] = digest(record)
        lines.append(json.dumps(record, ensure_ascii=False))
    return ("\n".join(lines) + dice.choice(["\n", "\n", "\n", ""])).encode(errors="surrogatepass")


def _suite(dice: Random) -> bytes:
    lines = [damaged(dice, dice.choice(_lines("suites", "*.jsonl")), changes=dice.choice([0, 1, 2])) for _ in range(3)]
    return "\n".join(map(json.dumps, lines)).encode()


def _pickled(dice: Random) -> bytes:
    try:
        value = damaged(dice, _snapshot(), changes=dice.choice([0, 1, 2]))
    except ValueError:
        value = _snapshot()
    if dice.random() < 0.2 and isinstance(value, dict):
        value["device_traces"] = [_snapshot()["device_traces"][0][:9]]
        value["device_traces"][0][0] = dice.choice([nest(40), {"action": nest(40)}, {**LOG}, os.getcwd, {1, 2}, b"x"])
    return pickle.dumps(value, protocol=dice.choice([2, 3, 4, 5]))


CONTENTS = {
    "model": lambda dice: json.dumps(config(dice)).encode(),
    "peft_config": lambda dice: json.dumps(adapter(dice)).encode(),
    "records": _records,
    "suite": _suite,
    "baseline": lambda dice: json.dumps(damaged(dice, _baseline(), changes=dice.choice([0, 1, 2]))).encode(),
    "log": lambda dice: json.dumps(damaged(dice, LOG, changes=dice.choice([0, 1, 2, 3]))).encode(),
    "snapshot": _pickled,
}


def path(dice: Random, folder: Path, kind: str) -> str:
    """A path for what reads files of that kind; most are such files, some damaged, some are no files."""
    target = folder / (str(dice.randrange(10**6)) + dice.choice(NAMES))
    chance = dice.random()
    if chance < 0.8:
        content = CONTENTS[kind](dice)
        target.write_bytes(mangled(dice, content) if dice.random() < 0.25 else content)
    elif chance < 0.9:
        _no_file(dice, target)
    elif chance < 0.93:
        target.mkdir()
        (target / "config.json").write_bytes(CONTENTS["model"](dice))
    elif chance < 0.96:
        return path(dice, folder, dice.choice(sorted(CONTENTS)))  # a file of another kind
    else:
        return dice.choice(ABSURD)
    return str(target)


def _no_file(dice: Random, target: Path) -> None:
    kind = dice.randrange(7)
    if kind == 0:
        os.mkfifo(target)
    elif kind == 1:
        target.symlink_to(target)
    elif kind == 2:
        target.symlink_to("/dev/zero")
    elif kind == 3:
        target.mkdir()
        os.mkfifo(target / "config.json")
    elif kind == 4:
        with target.open("wb") as file:
            file.truncate(2**33)  # a hole: no disk, no end in sight
    elif kind == 5:
        target.write_bytes(b"")
        target.chmod(0)
