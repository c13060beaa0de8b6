"""weights: the tensors of a CTranslate2 model, read from its `model.bin`.

Owns: the file's layout (binary version 6, as ctranslate2's `ModelSpec._serialize` writes it). The file is mapped, so only the tensors
asked for are read from the disk. Fails with `WeightsUnreadable`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from whisperd.errors import WhisperdError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINARY_VERSION = 6
FLOAT32, INT8, INT16, INT32, FLOAT16, BFLOAT16 = range(6)  # the order of `DataType` in ctranslate2/types.h
_STORED = {FLOAT32: "<f4", INT8: "i1", INT16: "<i2", INT32: "<i4", FLOAT16: "<f2", BFLOAT16: "<u2"}


class WeightsUnreadable(WhisperdError):
    """A `model.bin` that is damaged or of a version that is not known here."""

    code = "weights_unreadable"
    recoverable = True


class Stored(NamedTuple):
    """Where one tensor lies in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class _Reader:
    """Reads little-endian figures and names, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def figure(self, layout: str) -> int:
        (value,) = struct.unpack_from("<" + layout, self._data, self.position)
        self.position += struct.calcsize("<" + layout)
        return int(value)

    def name(self) -> str:
        size = self.figure("H")
        start, self.position = self.position, self.position + size
        return self._data[start : self.position - 1].decode("utf-8")  # it ends in a zero


def read(directory: str, scope: str) -> dict[str, NDArray[np.float32]]:
    """The tensors whose names begin with `scope` + "/", named without it, as float32; int8 and int16 ones are scaled back.

    Raises WeightsUnreadable.
    """
    path = os.path.join(directory, "model.bin")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            index = dict(_index(_Reader(data)))
            return {
                name.removeprefix(scope + "/"): _tensor(data, index, name)
                for name in index
                if name.startswith(scope + "/") and not name.endswith("_scale")
            }
    except (OSError, ValueError, struct.error) as error:
        raise WeightsUnreadable(
            f"cannot read the weights in {path}: {error}", hint="is the model damaged? Remove the directory and let it be fetched again"
        ) from error


def _index(reader: _Reader) -> Iterator[tuple[str, Stored]]:
    version = reader.figure("I")
    if version != BINARY_VERSION:
        raise ValueError(f"its binary version is {version}, not {BINARY_VERSION}")
    reader.name()  # of the specification
    reader.figure("I")  # its revision
    found: dict[str, Stored] = {}
    for _ in range(reader.figure("I")):
        name = reader.name()
        shape = tuple(reader.figure("I") for _ in range(reader.figure("B")))
        kind, size = reader.figure("B"), reader.figure("I")
        found[name] = Stored(shape, kind, reader.position)
        reader.position += size
    for _ in range(reader.figure("I")):
        alias, name = reader.name(), reader.name()
        for suffix in ("", "_scale"):  # the scale belongs to the tensor, whatever it is called
            if name + suffix in found:
                found[alias + suffix] = found[name + suffix]
    yield from found.items()


def _tensor(data: mmap.mmap, index: dict[str, Stored], name: str) -> NDArray[np.float32]:
    stored = _raw(data, index[name])
    if index[name].kind == BFLOAT16:  # the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values: NDArray[np.float32] = stored.astype(np.float32)
    if f"{name}_scale" in index:  # one for all of an int16 tensor, one for each row of an int8 one
        scale = _raw(data, index[f"{name}_scale"]).astype(np.float32)
        values /= scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))
    return values


def _raw(data: mmap.mmap, stored: Stored) -> NDArray[np.generic]:
    """As stored, in memory of its own: a view would keep the file mapped."""
    count = int(np.prod(stored.shape, dtype=np.int64))
    return np.frombuffer(data, _STORED[stored.kind], count, stored.offset).reshape(stored.shape).copy()
