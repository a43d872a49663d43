"""Files of tensors that are all holes: a true header, the true length, and no data."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport

NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
"""torch's dtype → safetensors' name."""

MOST_SAVED = 1 << 20
"""Bytes of a host tensor that `torch.save` keeps: states of generators and schedulers are read again."""


def write(
    path: Path,
    tensors: Iterable[tuple[str, Any, Any]],
    metadata: Mapping[str, str] | None = None,
    *,
    different: Container[str] = (),
) -> int:
    """Write a safetensors file of (name, dtype, shape) without data. Its bytes of data.

    Tensors that are `different` have a first byte that is not zero, so that no loader takes them for copies of others.
    """
    begins: list[int] = []
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": NAMES[str(dtype)], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        begins += [end] if name in different else []
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for begin in begins:
            file.seek(8 + len(text) + begin)
            file.write(b"\1")
    return end


def start() -> None:
    """Save holes from here on, by safetensors and by torch: the card has no values, and the scratch layer lies in memory."""
    import torch

    save: Any = torch.serialization._save
    untyped: Any = torch.UntypedStorage
    of_buffer: Any = torch.serialization._open_zipfile_writer_buffer
    open_buffer = of_buffer.__init__
    buffers = weakref.WeakSet[Any]()

    def into_buffer(self: Any, buffer: Any) -> None:
        open_buffer(self, buffer)
        buffers.add(self.file_like)

    def save_holes(obj: Any, zip_file: Any, *args: Any, **kwargs: Any) -> None:
        copied = untyped.cpu
        untyped.cpu = lambda storage: untyped(0)
        try:
            save(obj, _Writer(zip_file, untyped if zip_file in buffers else None), *args, **kwargs)
        finally:
            untyped.cpu = copied

    torch.serialization._save, of_buffer.__init__ = save_holes, into_buffer
    sys.meta_path.insert(0, AfterImport({"safetensors.torch": _save_file}))


class _Writer:
    """torch's writer of a file, which leaves out what the card holds, and what is large on the host.

    `untyped`: makes a storage of so many bytes, where torch writes to an object: that has no holes, and is given bytes.
    """

    def __init__(self, file: Any, untyped: Any = None) -> None:
        self.file, self.untyped = file, untyped

    def write_record(self, name: str, data: Any, nbytes: int) -> None:
        """Write a record; a storage that has no values here, or many, as a hole."""
        if hasattr(data, "nbytes") and not nbytes == data.nbytes() <= MOST_SAVED:
            if self.untyped is None:
                self.file.write_record_metadata(name, nbytes)
            else:
                self.file.write_record(name, self.untyped(nbytes), nbytes)
        else:
            self.file.write_record(name, data, nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _save_file(module: Any) -> None:
    def save_file(tensors: Mapping[str, Any], filename: Any, metadata: Mapping[str, str] | None = None, **_: Any) -> None:
        write(Path(filename), ((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()), metadata)

    module.save_file = save_file
