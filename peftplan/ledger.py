"""The ledger: every byte belongs to a line, a line is a tensor with named sizes, and totals are sums over lines."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.units import round512

Category = Literal[
    "weights",
    "adapter_weights",
    "quant_state",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "temporaries",
    "buffers",
    "workspaces",
    "gathered_weights",
    "communication",
]
EVERY_CATEGORY: tuple[Category, ...] = Category.__args__  # type: ignore[attr-defined]
"""The closed set of categories inside `allocated`, in the order in which they are shown."""
OF_SEVERAL_GPUS: tuple[Category, ...] = ("gathered_weights", "communication")
"""Categories that one GPU never has: parameters gathered from shards, and buffers of collectives."""
CATEGORIES = tuple(category for category in EVERY_CATEGORY if category not in OF_SEVERAL_GPUS)
"""The categories of one GPU."""

Place = Literal["device", "managed", "host"]
"""Where a tensor lives: the torch allocator, CUDA managed memory (paged optimizers), or the CPU."""

Dim = int | str
"""A dimension: an integer, or the name of a size computed once from the setup (`b`, `s`, `t = b·s`, …)."""


class Allocation(NamedTuple):
    """One tensor that a stored weight or an optimizer state needs: what it is called, its dtype and its dims."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    place: Place = "device"

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, before the allocator rounds them."""
        return ITEMSIZE[self.dtype] * self.numel


NO_SIZES: Mapping[str, int] = {}


class Line(NamedTuple):
    """`copies` tensors of one name, dtype and shape; bytes = copies × round512(itemsize × ∏ dims), without round512 on the host.

    `sizes` holds the values of named dims: one mapping, shared by all lines of an estimate.
    """

    name: str
    category: Category
    dtype: str
    dims: tuple[Dim, ...]
    copies: int
    source: str
    place: Place = "device"
    sizes: Mapping[str, int] = NO_SIZES

    @property
    def shape(self) -> tuple[int, ...]:
        """The dims as numbers."""
        return tuple(dim if isinstance(dim, int) else self.sizes[dim] for dim in self.dims)

    def bytes(self) -> int:
        """Bytes that the allocator counts for this line; on the host those of the tensors themselves."""
        size = ITEMSIZE[self.dtype] * prod([dim if isinstance(dim, int) else self.sizes[dim] for dim in self.dims])
        return self.copies * (size if self.place == "host" else round512(size))

    @property
    def formula(self) -> str:
        """The bytes as they are derived: `80 × round512(2 × b × s × 8192)`."""
        size = f"{ITEMSIZE[self.dtype]} × {' × '.join(str(dim) for dim in self.dims) or '1'}"
        return f"{self.copies} × {size}" if self.place == "host" else f"{self.copies} × round512({size})"

    @property
    def numbers(self) -> str:
        """The formula with its numbers put in: `80 × round512(2 × 1 × 2048 × 8192)`."""
        return self._replace(dims=self.shape).formula


@dataclass(frozen=True, slots=True)
class Ledger:
    """An ordered set of lines; every total is derived from them."""

    lines: tuple[Line, ...]

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(self.lines + other.lines)

    def with_tails(self, allocated: int) -> "Ledger":
        """These lines, and what the allocator counts beyond them: the tails of blocks that it hands out whole."""
        tails = allocated - self.bytes()
        if tails <= 0:
            return self
        return self + Ledger(
            (Line("tails of unsplit blocks", "temporaries", "uint8", (tails,), 1, "replay of torch's allocator"),)
        )

    def bytes(self, categories: Iterable[Category] = EVERY_CATEGORY, *, place: Place = "device") -> int:
        """Sum of the lines of these categories that live in `place`."""
        chosen = set(categories)
        return sum(line.bytes() for line in self.lines if line.category in chosen and line.place == place)

    def by_category(self) -> dict[Category, int]:
        """Device bytes of each category, in the fixed order of `EVERY_CATEGORY`; those of several GPUs where there are any."""
        sizes = dict.fromkeys(EVERY_CATEGORY, 0)
        for line in self.lines:
            if line.place == "device":
                sizes[line.category] += line.bytes()
        return {category: nbytes for category, nbytes in sizes.items() if nbytes or category not in OF_SEVERAL_GPUS}
