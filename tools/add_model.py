"""Maintainers: add one model to the built-in catalogue, or rewrite the catalogue's index.

    python tools/add_model.py config.json --repo-id Qwen/Qwen3-8B --source "config.json of the repository"
    python tools/add_model.py --reindex

A model is one file, `data/models/<name>.json`: the facts of its config in one normalized form, the parameter count of
transformers' own model on the meta device, and where the facts come from. `data/models/index.json` has one row per model, so
that a name is found without opening the others. Needs the extra `trace` (the count is the real model's).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftplan.datafiles import DATA

MODELS = DATA / "models"

NOISE = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "tokenizer_name",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "verbose",
    }
)
"""Fields of a config.json that say nothing about the model's tensors or its arithmetic."""

INDEXED = (
    "name",
    "repo_id",
    "aliases",
    "siblings",
    "model_type",
    "model_class",
    "num_parameters",
    "verified",
    "exactness",
)
"""The fields of an index row; `model_type` is the config's."""


def canonical_name(repo_id: str) -> str:
    """The rule of names: the last part of the id in lower case, `_` as `-`, without `meta-` before and `-hf` after it."""
    return repo_id.rpartition("/")[2].lower().replace("_", "-").removeprefix("meta-").removesuffix("-hf")


def normalize(config: Mapping[str, Any], *, model_class: str) -> dict[str, Any]:
    """The facts of a config in one form: sorted, without noise, `torch_dtype` as `dtype`, `architectures` = the class counted."""
    return {"architectures": [model_class], **_facts(config)}


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, value in config.items():
        if key in NOISE or key == "architectures" or (key in ("id2label", "label2id") and _default_labels(value)):
            continue
        facts["dtype" if key == "torch_dtype" else key] = _facts(value) if isinstance(value, Mapping) else value
    return dict(sorted(facts.items()))


def _default_labels(labels: Mapping[str, Any]) -> bool:
    """True for transformers' own two labels, which every config that states none is written with."""
    return {str(part) for pair in labels.items() for part in pair} == {"0", "1", "LABEL_0", "LABEL_1"}


def dump(entry: Mapping[str, Any]) -> str:
    """One field per line, each value compact."""
    fields = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def write_entry(entry: Mapping[str, Any], folder: Path = MODELS) -> Path:
    """Write `<name>.json`; fields that are null or empty are left out, except `verified`."""
    path = folder / f"{entry['name']}.json"
    path.write_text(dump({k: v for k, v in entry.items() if v or k in ("verified", "config")}), encoding="utf-8")
    return path


def read_entries(folder: Path = MODELS) -> list[dict[str, Any]]:
    """Every model file, by name."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json")) if p.name != "index.json"]


def index_text(entries: Iterable[Mapping[str, Any]]) -> str:
    """The index: a JSON list, one row per line."""
    rows = []
    for entry in entries:
        full = {"aliases": [], "siblings": [], **entry, "model_type": entry["config"]["model_type"]}
        rows.append(json.dumps({key: full[key] for key in INDEXED}, ensure_ascii=False, separators=(",", ":")))
    return "[\n" + ",\n".join(rows) + "\n]\n"


def reindex(folder: Path = MODELS) -> None:
    """Rewrite `index.json` from the model files."""
    (folder / "index.json").write_text(index_text(read_entries(folder)), encoding="utf-8")


def entry_of(config: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The catalogue entry of a config; the count is that of transformers' model on the meta device."""
    from peftplan.libraries.meta import read_architecture

    arch = read_architecture(config, name=args.repo_id)
    return {
        "name": args.name or canonical_name(args.repo_id),
        "repo_id": args.repo_id,
        "aliases": args.alias,
        "siblings": args.sibling,
        "model_class": arch.model_class,
        "num_parameters": arch.num_parameters,
        "verified": args.published_params == arch.num_parameters,
        "published_params": args.published_params,
        "exactness": args.exactness,
        "source": args.source,
        "note": args.note,
        "config": normalize(config, model_class=arch.model_class),
    }


def main(argv: list[str] | None = None, *, folder: Path = MODELS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a config.json")
    parser.add_argument("--reindex", action="store_true", help="only rewrite the index")
    parser.add_argument("--repo-id", help="the model's id on the Hub")
    parser.add_argument("--source", help="where the config was read, with its version or commit")
    parser.add_argument("--exactness", default="verbatim config", help="verbatim config | reconstructed from stated facts")
    parser.add_argument("--published-params", type=int, help="the count that the publisher states, if any")
    parser.add_argument("--name", help="instead of the name that the id gives")
    parser.add_argument("--alias", action="append", default=[], help="another name or id of the same repository")
    parser.add_argument("--sibling", action="append", default=[], help="id of another checkpoint of the same shapes")
    parser.add_argument("--note", default="")
    args = parser.parse_args(argv)
    if not args.reindex:
        if args.config is None or not args.repo_id or not args.source:
            parser.error("a config.json, --repo-id and --source are needed, or --reindex")
        print(write_entry(entry_of(json.loads(args.config.read_text(encoding="utf-8")), args), folder))
    reindex(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
