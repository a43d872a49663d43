"""The JSON of `peftplan serve`: files, merge, and device bytes."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from peftplan.results.documents import MethodDocument, ModelDocument


class AdapterFileDocument(TypedDict):
    """`adapter_model.safetensors`."""

    name: str
    bytes: int
    tensors: int
    dtypes: list[str]


class CheckpointDocument(TypedDict):
    """The merged model's files."""

    dtype: str
    bytes: int
    files: list[int]
    """Bytes of each file."""
    tensors: int


class MergeDocument(TypedDict):
    """Bytes at the peak of a merge."""

    base: int
    adapter: int
    temporaries: int
    total: int
    host: int
    """Bytes that wait on the CPU while the GPU merges."""
    largest: str
    """The module whose merge needs most."""


class LoadedDocument(TypedDict):
    """Device bytes while the model serves."""

    base: int
    adapter: int
    """Bytes of one adapter."""
    shared_by_adapters: int
    adapters: int
    """How many."""
    all_adapters: int
    kv_cache: int | None
    total: int


class CacheTensorDocument(TypedDict):
    """Tensors of the KV cache."""

    kind: str
    part: str
    dtype: str
    shape: list[int]
    layers: int
    bytes: int


class CacheDocument(TypedDict):
    """The KV cache."""

    bytes: int
    tokens: int
    growing: int
    """What one token more needs for a moment."""
    tensors: list[CacheTensorDocument]


class ServingLimitsDocument(TypedDict):
    """The largest sizes that fit, each with the others as requested. `null`: there is none, or its bytes are not known."""

    adapters: int | None
    context: int | None
    """Tokens of each sequence in the cache."""
    batch_size: int | None
    """Sequences."""
    bounded: list[str]
    """Sizes whose search ended before the card was full."""


class ServingVerdictDocument(TypedDict):
    """Whether what is served fits one card."""

    name: str
    usable_bytes: int
    usable_source: str
    verdict: Literal["fits", "tight", "does_not_fit"]
    needed_bytes: int
    """Base, adapters, KV cache, temporaries of decoding a token, workspaces, and the CUDA context."""
    step_bytes: int
    """Temporaries of decoding a token: logits and scores, or a layer while its cache grows."""
    workspace_bytes: int
    """cuBLAS's workspaces."""
    context_bytes: int
    context_source: str
    context_assumed: bool
    """Whether the context is that of another card."""
    headroom_bytes: int
    most: ServingLimitsDocument
    """With at least 5 % of the usable bytes left."""
    most_tight: ServingLimitsDocument
    """With less left."""


class ServingDocument(TypedDict):
    """What comes after training. `null` is what does not exist or is not known; `refused` says why."""

    schema_version: Literal[1]
    model: ModelDocument
    method: MethodDocument
    adapter_file: AdapterFileDocument | None
    merged_checkpoint: CheckpointDocument | None
    merge_memory: dict[Literal["cpu", "gpu", "gpu_quantized"], MergeDocument] | None
    serving: LoadedDocument
    kv_cache: CacheDocument | None
    refused: dict[str, str]
    assumptions: dict[str, object]
    not_modelled: list[str]
    gpus: list[ServingVerdictDocument]
    """A verdict for each card that was named."""
