"""Types of the sizes that a formula takes: whole numbers, or numpy's arrays of them where many sizes are evaluated at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

Ints: TypeAlias = "NDArray[np.int64]"
Flags: TypeAlias = "NDArray[np.bool_]"
Floats: TypeAlias = "NDArray[np.float64]"
Objects: TypeAlias = "NDArray[np.object_]"
Codes: TypeAlias = "NDArray[np.int8]"
Sizes: TypeAlias = "int | Sequence[int] | NDArray[np.int64]"
"""One size, or several, as a list or an array."""
Size = TypeVar("Size", int, "NDArray[np.int64]")
"""One size, or a size at each point."""


class Derived(str):
    """A named size that is computed from others. Equal to its name, as other named sizes are."""

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The size at these sizes, which may be arrays as well as integers."""
        raise NotImplementedError


Fact: TypeAlias = "int | NDArray[np.bool_] | NDArray[np.int64]"
"""Whether a size is beyond a limit, at one point or at each."""
