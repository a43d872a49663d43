"""The result of `serving`: files, merge, and device bytes, as frozen objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from peftplan.deployment.kv_cache import CacheTensor, growing_bytes
from peftplan.frames import as_html, dataframe
from peftplan.planning.finished import AdapterFile, Checkpoint, MergeMemory
from peftplan.results.estimate import SCHEMA_VERSION

if TYPE_CHECKING:
    from pandas import DataFrame

    from peftplan.planning.serving_documents import ServingDocument
    from peftplan.planning.serving_verdict import ServingVerdict
    from peftplan.results.documents import Assumptions, MethodDocument, ModelDocument

LEFT_OUT = ("activations of the prompt", "sampling filters other than top-k", "blocks that a serving engine allocates ahead")
"""What no number here includes."""
OF_A_CARD = ("temporaries of decoding a token", "CUDA context and workspaces")
"""What only the verdict on a card includes."""
KV_CACHE = "the KV cache"
"""What the sum also leaves out if the model has a cache that cannot be counted here."""


@dataclass(frozen=True)
class Cache:
    """The KV cache: its tensors, and with how many tokens of each sequence they are filled, virtual ones included."""

    tensors: tuple[CacheTensor, ...]
    tokens: int

    @property
    def num_bytes(self) -> int:
        """Device bytes."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, object]:
        """JSON values; `growing` is what one token more needs for a moment."""
        return {
            "bytes": self.num_bytes,
            "tokens": self.tokens,
            "growing": growing_bytes(self.tensors),
            "tensors": [{**t._asdict(), "shape": list(t.shape), "bytes": t.num_bytes} for t in self.tensors],
        }


@dataclass(frozen=True)
class Loaded:
    """Device bytes while serving: the base, each adapter, what all adapters share, and how many adapters there are."""

    base: int
    adapter: int
    shared: int
    adapters: int

    @property
    def all_adapters(self) -> int:
        """Every adapter, and what they share."""
        return self.adapters * self.adapter + self.shared


@dataclass(frozen=True)
class Serving:
    """What a fine-tuned model takes on disk, in a merge and while it is served.

    A part is None, or `merges` empty, if it does not exist or is not known; `refused` says why, by the part's name.
    """

    model: ModelDocument
    method: MethodDocument
    file: AdapterFile | None
    checkpoint: Checkpoint | None
    merges: tuple[MergeMemory, ...]
    loaded: Loaded
    cache: Cache | None
    refused: Mapping[str, str]
    assumptions: Assumptions
    not_modelled: tuple[str, ...] = LEFT_OUT
    gpus: tuple[ServingVerdict, ...] = ()

    @property
    def total(self) -> int:
        """Device bytes of base, adapters and cache, as far as it is known."""
        return self.loaded.base + self.loaded.all_adapters + (self.cache.num_bytes if self.cache else 0)

    def to_dict(self) -> ServingDocument:
        """JSON values, bytes as integers; null is what does not exist or is not known, with its reason under `refused`."""
        loaded = self.loaded
        document = {
            "schema_version": SCHEMA_VERSION,
            "model": dict(self.model),
            "method": dict(self.method),
            "adapter_file": self.file and self.file.to_dict(),
            "merged_checkpoint": self.checkpoint and self.checkpoint.to_dict(),
            "merge_memory": {merge.place: merge.to_dict() for merge in self.merges} or None,
            "serving": {
                "base": loaded.base,
                "adapter": loaded.adapter,
                "shared_by_adapters": loaded.shared,
                "adapters": loaded.adapters,
                "all_adapters": loaded.all_adapters,
                "kv_cache": self.cache and self.cache.num_bytes,
                "total": self.total,
            },
            "kv_cache": self.cache and self.cache.to_dict(),
            "refused": dict(self.refused),
            "assumptions": dict(self.assumptions),
            "not_modelled": list(self.not_modelled),
            "gpus": [verdict.to_dict() for verdict in self.gpus],
        }
        return cast("ServingDocument", document)

    def records(self) -> list[dict[str, str | int]]:
        """One record per number: its part, its name, its bytes."""
        document = self.to_dict()
        merged, cache, file = document["merged_checkpoint"], document["kv_cache"], document["adapter_file"]
        rows: list[tuple[str, str, int]] = [("adapter_file", file["name"], file["bytes"])] if file else []
        rows += [("merged_checkpoint", f"file {i}", size) for i, size in enumerate(merged["files"] if merged else (), start=1)]
        for place, parts in (document["merge_memory"] or {}).items():
            rows += [(f"merge_memory.{place}", name, size) for name, size in parts.items() if isinstance(size, int)]
        loaded = document["serving"]
        rows += [("serving", "base", loaded["base"]), ("serving", "adapter", loaded["adapter"])]
        rows += [
            ("serving", "shared_by_adapters", loaded["shared_by_adapters"]),
            ("serving", "all_adapters", loaded["all_adapters"]),
        ]
        rows += [("kv_cache", f"{t['kind']} {t['part']}", t["bytes"]) for t in (cache["tensors"] if cache else ())]
        rows.append(("serving", "total", loaded["total"]))
        return [{"part": part, "name": name, "bytes": size} for part, name, size in rows]

    def to_dataframe(self) -> DataFrame:
        """`records()` as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)
