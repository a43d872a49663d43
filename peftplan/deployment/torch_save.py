"""Bytes of a file that `torch.save` writes: a ZIP archive of a pickle and one uncompressed record per storage.

Source: torch, `torch/serialization.py` (`_save`: protocol 2, storages by persistent id) and
`caffe2/serialize/inline_container.cc` (`PyTorchStreamWriter`: each record's data begins at a multiple of 64, after a padded local
header, and ends with a data descriptor); CPython's `Modules/_pickle.c` (`save_dict`, `save_list`: batches of 1,000). The pickle
is not written: its opcodes are counted. Tensors must be contiguous and own their storage.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE

STORAGES = {
    "fp64": "DoubleStorage", "fp32": "FloatStorage", "bf16": "BFloat16Storage", "fp16": "HalfStorage", "uint8": "ByteStorage",
    "int8": "CharStorage", "int16": "ShortStorage", "int32": "IntStorage", "int64": "LongStorage", "bool": "BoolStorage",
}  # fmt: skip
"""Our dtypes → the classes by which a pickle names their storages."""
BATCH = 1000
"""Items between a mark and its opcode."""
LAST_SHORT_MEMO = 255
"""Entries of the memo up to this one are stored and read by one byte, later ones by four."""

ALIGNMENT, LOCAL_HEADER, DESCRIPTOR, CENTRAL_HEADER = 64, 30, 16, 46
PADDING_HEADER = 4
"""Id and length of the extra field that pads a local header."""
END = 56 + 20 + 22
"""ZIP64 end of central directory, its locator, end of central directory."""
LARGE = 2**32 - 1
"""From here on a size or an offset stands in a ZIP64 field."""
BEFORE = ((".format_version", 1), (".storage_alignment", 2), ("byteorder", 6))
AFTER = (("version", 2), (".data/serialization_id", 40))
"""Records around the storages, and their bytes."""


class SavedTensor(NamedTuple):
    """A contiguous tensor; `device` is where it lives: `cpu`, or `cuda:0`, whose text is written anew for each storage."""

    dtype: str
    shape: tuple[int, ...]
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of its storage."""
        return ITEMSIZE[self.dtype] * prod(self.shape)


Value = SavedTensor | str | int | float | bool | None | Mapping[str, "Value"] | Mapping[int, "Value"] | Sequence["Value"]


def file_bytes(value: Value, *, stem: str) -> int:
    """Bytes of `torch.save(value, f"{stem}.pt")`. A text that occurs again is one object, as Python interns names."""
    pickle = _Pickle()
    pickle.write(value)
    folder = len(f"{stem}/")
    before = (("data.pkl", pickle.size + len(b"\x80\x02.")), *BEFORE)
    records = [(folder + len(name), size) for name, size in before]
    records += [(folder + len("data/") + len(str(number)), size) for number, size in enumerate(pickle.storages)]
    return _archive(records + [(folder + len(name), size) for name, size in AFTER])


def _archive(records: Sequence[tuple[int, int]]) -> int:
    """Bytes of the archive with these records, in this order: characters of the name, bytes."""
    end, central = 0, 0
    for name, size in records:
        large, far = size >= LARGE, end >= LARGE
        field = 4 + 16 * large + 8 * far if large or far else 0  # ZIP64: sizes or an offset that do not fit four bytes
        header = LOCAL_HEADER + name + field + PADDING_HEADER
        start = -(-(end + header) // ALIGNMENT) * ALIGNMENT
        central += CENTRAL_HEADER + name + field
        end = start + size + DESCRIPTOR + (8 if large or far else 0)
    return end + central + END


class _Repeated(NamedTuple):
    """What a dict of tensors takes when written again: bytes without its tensors' numbers, entries of the memo, storages."""

    size: int
    entries: int
    storages: tuple[int, ...]


class _Pickle:
    """Counts the bytes of a pickle under protocol 2."""

    def __init__(self) -> None:
        self.size = 0
        self.storages: list[int] = []
        self._memo: dict[object, int] = {}
        self._entries = 0
        self._met: set[SavedTensor] = set()
        self._again: dict[SavedTensor, tuple[int, int]] = {}
        """Tensor → bytes without its number, and entries of the memo, once all that it refers to is in the memo's later part."""
        self._repeated: dict[int, _Repeated] = {}
        """The same, of dicts whose tensors and keys have all been met; by identity, as equal layers share one dict."""

    def write(self, value: Value) -> None:
        """One value."""
        if isinstance(value, SavedTensor):
            self._numbered(value)
        elif value is None or isinstance(value, bool):
            self.size += 1
        elif isinstance(value, int):
            self.size += _int_bytes(value)
        elif isinstance(value, float):
            self.size += 9
        elif isinstance(value, str):
            self._text(value)
        elif isinstance(value, Mapping):
            self._dict(value)
        elif isinstance(value, tuple):
            self._tuple(value)
        else:
            self._list(value)

    def _put(self, key: object = None) -> None:
        """A new entry of the memo, found again by its key."""
        self.size += 2 if self._entries <= LAST_SHORT_MEMO else 5
        if key is not None:
            self._memo[key] = self._entries
        self._entries += 1

    def _get(self, key: object) -> bool:
        """Whether the memo has it; then its number is written."""
        entry = self._memo.get(key)
        if entry is None:
            return False
        self.size += 2 if entry <= LAST_SHORT_MEMO else 5
        return True

    def _text(self, value: str, *, anew: bool = False) -> None:
        if not anew and self._get(value):
            return
        self.size += 5 + len(value.encode())
        self._put(None if anew else value)

    def _global(self, module: str, name: str) -> None:
        key = (module, name)
        if not self._get(key):
            self.size += len(f"c{module}\n{name}\n")
            self._put(key)

    def _tuple(self, values: Sequence[Value]) -> None:
        for value in values:
            self.write(value)
        self.size += 1 if len(values) <= 3 else 2  # TUPLE1 to 3, else a mark and TUPLE
        if values:
            self._put()

    def _list(self, values: Sequence[Value]) -> None:
        self.size += 1
        self._put()
        for value in values:
            self.write(value)
        self.size += len(values) if len(values) < 2 else 2 * -(-len(values) // BATCH)

    def _dict(self, values: Mapping[str, Value] | Mapping[int, Value]) -> None:
        repeated = self._repeated.get(id(values))
        if repeated is not None:
            first = len(self.storages)
            self.storages += repeated.storages
            self.size += repeated.size + _digits(first, len(self.storages))
            self._entries += repeated.entries
            return
        known = all(isinstance(v, SavedTensor) and v in self._again and key in self._memo for key, v in values.items())
        size, entries, first = self.size, self._entries, len(self.storages)
        self.size += 1
        self._put()
        for key, value in values.items():
            self.write(key)
            self.write(value)
        count = len(values)
        self.size += count if count < 2 else 2 * (count // BATCH + 1)  # a whole batch is followed by another, even an empty one
        if known and entries > LAST_SHORT_MEMO:
            written = self.size - size - _digits(first, len(self.storages))
            self._repeated[id(values)] = _Repeated(written, self._entries - entries, tuple(self.storages[first:]))

    def _numbered(self, tensor: SavedTensor) -> None:
        """A tensor; one like those before it takes as many bytes, but for the digits of its number."""
        digits = len(str(len(self.storages)))
        again = self._again.get(tensor)
        if again is not None:
            self.size += again[0] + digits
            self._entries += again[1]
            self.storages.append(tensor.nbytes)
            return
        size, entries = self.size, self._entries
        self._tensor(tensor)
        if entries > LAST_SHORT_MEMO and tensor in self._met:
            self._again[tensor] = (self.size - size - digits, self._entries - entries)
        self._met.add(tensor)

    def _tensor(self, tensor: SavedTensor) -> None:
        """`_rebuild_tensor_v2((storage), 0, size, stride, False, OrderedDict())`."""
        self._global("torch._utils", "_rebuild_tensor_v2")
        self.size += 2  # the marks of both tuples
        self._text("storage")
        self._global("torch", STORAGES[tensor.dtype])
        self._text(str(len(self.storages)), anew=True)
        self._text(tensor.device, anew=tensor.device != "cpu")
        self.write(prod(tensor.shape))
        self.size += 1
        self._put()
        self.size += 1  # BINPERSID
        self.write(0)
        self._tuple(tensor.shape)
        self._tuple(tuple(prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))))
        self.size += 1  # requires_grad
        self._global("collections", "OrderedDict")
        self.size += 2  # an empty tuple, REDUCE
        self._put()
        self.size += 1
        self._put()
        self.size += 1
        self._put()
        self.storages.append(tensor.nbytes)


def _digits(first: int, end: int) -> int:
    """Digits of the numbers from the first up to, but without, the end."""
    return sum(len(str(number)) for number in range(first, end))


def _int_bytes(value: int) -> int:
    """BININT1, BININT2, BININT, or LONG1."""
    if 0 <= value < 2**8:
        return 2
    if 0 <= value < 2**16:
        return 3
    return 5 if -(2**31) <= value < 2**31 else 2 + value.bit_length() // 8 + 1
