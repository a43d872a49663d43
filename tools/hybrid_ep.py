"""DeepEP's hybrid-ep branch without its compiled part, for rehearsals: what its buffers take from torch's allocator.

Source: deepseek-ai/DeepEP at 94a9f8f6, deep_ep/hybrid_ep_buffer.py, csrc/hybrid_ep/hybrid_ep.cu (`dispatch_with_permute`,
`combine_with_unpermute`) and executor/executor.cu (`allgather_routing_map`, `metadata_preprocess_core`). Each expert of all ranks
gets as many tokens. Left out: what ranks send each other, which lies beside torch's allocator.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

RANKS_OF_NODE = 8
TOKENS_OF_CHUNK = 64


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
            rows = len(hidden) * self.top_k
            of_experts = torch.tensor([(rows + place) // self.owned for place in range(self.owned)])
        rows = handle[-1] * self.top_k
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


def install(top_k: int) -> None:
    """Let a program import `deep_ep`."""
    module = ModuleType("deep_ep")
    module.__spec__ = ModuleSpec("deep_ep", None)
    HybridEPBuffer.top_k = top_k
    module.__dict__["HybridEPBuffer"] = HybridEPBuffer
    sys.modules["deep_ep"] = module
