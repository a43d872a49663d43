"""DeepEP without its compiled part, for rehearsals: what its buffers take from torch's allocator.

Source: deepseek-ai/DeepEP at 94a9f8f6 (hybrid-ep), deep_ep/buffer.py, csrc/deep_ep.cpp (`get_dispatch_layout`,
`intranode_dispatch`, `internode_dispatch`, `intranode_combine`), deep_ep/hybrid_ep_buffer.py, csrc/hybrid_ep/hybrid_ep.cu
(`dispatch_with_permute`, `combine_with_unpermute`) and executor/executor.cu (`allgather_routing_map`,
`metadata_preprocess_core`). Each expert of all ranks gets as many tokens, and of the ranks that own the experts a token reaches
as many as `received` says; with `ROUTING=worst` in the environment this rank's experts get every token of all ranks. Left out:
what ranks send each other, which lies beside torch's allocator.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from math import comb
from types import ModuleType, SimpleNamespace
from typing import Any

RANKS_OF_NODE = 8
TOKENS_OF_CHUNK = 64


def all_come_here() -> bool:
    """Whether the experts of this rank get every token of all ranks."""
    return os.environ.get("ROUTING") == "worst"


def rows_here(tokens: int, *, ranks: int, owned: int, top_k: int) -> int:
    """A row for each expert of this rank that a token goes to, from as many tokens of each rank."""
    return tokens * (ranks * min(top_k, owned) if all_come_here() else top_k)


class HybridEPBuffer:
    """The exchange of tokens between the ranks that own the experts."""

    top_k = 1
    """Experts of each token, which the emulated card's routing map does not hold."""

    def __init__(self, group: Any, hidden_dim: int, max_num_of_tokens_per_rank: int, num_local_experts: int, **_: Any) -> None:
        self.ranks, self.owned = group.size(), num_local_experts
        self.near = min(RANKS_OF_NODE, self.ranks)

    def dispatch_with_permute(
        self, *, hidden: Any, probs: Any = None, handle: Any = None, routing_map: Any = None, **_: Any
    ) -> tuple[Any, Any, None, Any, Any]:
        """A row for each expert of each token, and how many each expert of this rank gets where there is no layout yet."""
        import torch

        of_experts = None
        if handle is None:
            handle = self._layout(len(hidden), routing_map.shape[1])
            rows = rows_here(len(hidden), ranks=self.ranks, owned=self.owned, top_k=self.top_k)
            of_experts = torch.tensor([(rows + place) // self.owned for place in range(self.owned)])
        rows = rows_here(handle[-1], ranks=self.ranks, owned=self.owned, top_k=self.top_k)
        out = torch.empty((rows, hidden.shape[1]), dtype=hidden.dtype, device="cuda")
        weights = None if probs is None else torch.empty(rows, device="cuda")
        return out, weights, None, of_experts, handle

    def combine_with_unpermute(self, *, hidden: Any, handle: Any, probs: Any = None, **_: Any) -> tuple[Any, Any]:
        """A row for each token."""
        import torch

        out = torch.empty((handle[-1], hidden.shape[1]), dtype=hidden.dtype, device="cuda")
        return out, None if probs is None else torch.empty((handle[-1], self.owned * self.ranks), device="cuda")

    def _layout(self, tokens: int, experts: int) -> tuple[Any, ...]:
        import torch

        def new(*sizes: int, dtype: Any = torch.int32) -> Any:
            return torch.empty(sizes, dtype=dtype, device="cuda")

        nodes, everywhere = self.ranks // self.near, new(tokens * self.ranks, experts, dtype=torch.bool)
        layout = (
            new(tokens * nodes, self.near),
            new(-(-tokens // 16) * 16, nodes, dtype=torch.bool),
            new(tokens, nodes - 1, dtype=torch.bool),
            new(tokens * self.ranks, self.owned, dtype=torch.bool),
            new(1),
            new(-(-tokens // TOKENS_OF_CHUNK) * self.ranks),
            new(tokens * self.ranks, self.owned),
            new(self.owned),
            tokens,
        )
        del everywhere
        return layout


def received(tokens: int, *, ranks: int, experts: int, top_k: int, dealt: bool = False) -> int:
    """Tokens that a rank gets once, from as many tokens of each rank: those of which it owns an expert, if all choices of `top_k`
    experts are as likely. `dealt`: tokens take them in turn, and this is the first rank."""
    if all_come_here():
        return tokens * ranks
    if dealt:
        owned = experts // ranks
        return ranks * sum(any((token * top_k + place) % experts < owned for place in range(top_k)) for token in range(tokens))
    missed = comb(experts - experts // ranks, top_k) / comb(experts, top_k)
    return round(tokens * ranks * (1 - missed))


class Buffer:
    """The exchange of tokens between the ranks that own the experts, of one node or of several whole ones."""

    num_sms = 20
    dealt = False
    """Whether tokens take experts in turn (nemo_automodel, components/moe/layers.py, `FakeBalancedGate`)."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, **_: Any) -> None:
        self.group, self.ranks = group, group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @classmethod
    def set_num_sms(cls, count: int) -> None:
        cls.num_sms = count

    @staticmethod
    def get_dispatch_config(ranks: int) -> Any:
        """How large the buffers are that ranks send through, beside torch's allocator."""
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda *_: 0, get_rdma_buffer_size_hint=lambda *_: 0)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Any, num_experts: int, **_: Any) -> tuple[Any, None, Any, Any, None]:
        """How many tokens go to each rank and to each expert, and which go to which rank."""
        return (
            _empty(self.ranks),
            None,
            _empty(num_experts),
            _empty(len(topk_idx), self.ranks, dtype="bool"),
            None,
        )

    def dispatch(
        self,
        x: Any,
        handle: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        **_: Any,
    ) -> tuple[Any, Any, Any, Any, Any, None]:
        """A row for each token that has an expert here; where there is no handle yet, its experts and weights too."""
        import torch

        channels, tokens = self.num_sms // 2, len(x)
        if handle is not None:
            out = torch.empty((len(handle[3]), x.shape[1]), dtype=x.dtype, device="cuda")
            del x
            if self.ranks <= RANKS_OF_NODE:
                scratch = _empty(len(handle[3])), _empty(self.ranks, channels), _empty(tokens, self.ranks)
                del scratch
            return out, None, None, None, None, None
        experts, top_k = len(num_tokens_per_expert), topk_idx.shape[1]
        rank_matrix, channel_matrix = _empty(self.ranks, self.ranks), _empty(self.ranks, channels)
        count = received(tokens, ranks=self.ranks, experts=experts, top_k=top_k, dealt=self.dealt)
        out = torch.empty((count, x.shape[1]), dtype=x.dtype, device="cuda")
        source, channel_of_received = _empty(count), _empty(self.ranks, channels)
        heads = (_empty(tokens, self.ranks),)
        if (nodes := self.ranks // RANKS_OF_NODE) > 1:  # `internode_dispatch`
            source = _empty(count, dtype="int64")
            passing = received(tokens, ranks=nodes, experts=experts, top_k=top_k, dealt=self.dealt)
            heads = _empty(tokens, nodes), _empty(passing, RANKS_OF_NODE)
        indices, weights = (torch.empty((count, top_k), dtype=y.dtype, device="cuda") for y in (topk_idx, topk_weights))
        handle = rank_matrix, channel_matrix, channel_of_received, source, is_token_in_rank, *heads
        owned = experts // self.ranks
        rows = rows_here(tokens, ranks=self.ranks, owned=owned, top_k=top_k)
        of_experts = [(rows + place) // owned for place in range(owned)]
        return out, indices, weights, of_experts, handle, None

    def combine(self, x: Any, handle: Any, topk_weights: Any = None, **_: Any) -> tuple[Any, Any, None]:
        """A row for each token of this rank."""
        import torch

        tokens, weights = len(handle[4]), None
        if topk_weights is not None:
            weights = torch.empty((tokens, topk_weights.shape[1]), dtype=topk_weights.dtype, device="cuda")
        return torch.empty((tokens, x.shape[1]), dtype=x.dtype, device="cuda"), weights, None


def _empty(*sizes: int, dtype: str = "int32") -> Any:
    import torch

    return torch.empty(sizes, dtype=getattr(torch, dtype), device="cuda")


EVENTS = {"EventHandle": None, "EventOverlap": None}
UCCL = "nemo_automodel.components.moe.uccl_ep"
"""NeMo Automodel's buffer over UCCL-EP, which takes the same tensors (0.7.0, uccl_ep/_buffer.py, `dispatch`, `combine`)."""


def install(top_k: int, *, dealt: bool = False) -> None:
    """Let a program import `deep_ep`. `dealt`: tokens take experts in turn."""
    HybridEPBuffer.top_k, Buffer.dealt = top_k, dealt
    names = {
        "deep_ep": {"HybridEPBuffer": HybridEPBuffer, "Buffer": Buffer},
        "deep_ep.utils": EVENTS,
        "uccl": {},
        UCCL: {"UCCLBuffer": Buffer, "__path__": []},
        f"{UCCL}.buffer": EVENTS,
    }
    for name, members in names.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(members)
        sys.modules[name] = module
