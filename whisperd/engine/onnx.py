"""onnx: just enough of the ONNX file format to take the weights out of one network and write another around them.

Owns: the wire format of protobuf, for the handful of messages that a small graph needs. Pure: bytes in, bytes out.
Fails with LookupError on what is no such ONNX file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Numbers of the fields, by message, as onnx.proto has them.
_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET = 1, 7, 8
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_TENSOR, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 1, 3, 8, 20
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}
_IR = 8

Shape = tuple[Any, Sequence[int | str]]
"""numpy's type of a tensor, and its sizes; one that varies is a word."""


def weights_of(model: bytes) -> dict[str, Any]:
    """The float32 weights of a model by their names."""
    found = {}
    for number, message in _fields(_only(model, _MODEL_GRAPH)):
        if number == _GRAPH_TENSOR and dict(_fields(message))[_TENSOR_TYPE] == _TYPES[np.dtype(np.float32)]:
            shape = [size for field, size in _fields(message) if field == _TENSOR_SHAPE]
            name = _only(message, _TENSOR_NAME).decode()
            found[name] = np.frombuffer(_only(message, _TENSOR_RAW), dtype=np.float32).reshape(shape)
    return found


def opset_of(model: bytes) -> bytes:
    """Which version of the operators a model speaks, as `model` takes it."""
    return _only(model, _MODEL_OPSET)


def model(
    nodes: Sequence[bytes],
    constants: Mapping[str, Any],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    *,
    opset: bytes,
) -> bytes:
    """A model of these nodes, what it is given and what it gives."""
    graph = [_field(_GRAPH_NODE, node) for node in nodes]
    graph.append(_field(_GRAPH_NAME, b"graph"))
    graph += [_field(_GRAPH_TENSOR, _tensor(name, value)) for name, value in constants.items()]
    graph += [_field(_GRAPH_INPUT, _value(name, *shape)) for name, shape in inputs.items()]
    graph += [_field(_GRAPH_OUTPUT, _value(name, *shape)) for name, shape in outputs.items()]
    return _field(_MODEL_IR, _IR) + _field(_MODEL_GRAPH, b"".join(graph)) + _field(_MODEL_OPSET, opset)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int | Sequence[int]) -> bytes:
    """One operation; an input that is left out is ""."""
    parts = [_field(_NODE_INPUT, name.encode()) for name in inputs]
    parts += [_field(_NODE_OUTPUT, name.encode()) for name in outputs]
    parts.append(_field(_NODE_OP, op.encode()))
    parts += [_field(_NODE_ATTRIBUTE, _attribute(name, value)) for name, value in attributes.items()]
    return b"".join(parts)


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    named = _field(_ATTRIBUTE_NAME, name.encode())
    if isinstance(value, int):
        return named + _field(_ATTRIBUTE_TYPE, 2) + _field(_ATTRIBUTE_INT, value)
    return named + _field(_ATTRIBUTE_TYPE, 7) + b"".join(_field(_ATTRIBUTE_INTS, item) for item in value)


def _tensor(name: str, value: Any) -> bytes:
    shape = b"".join(_field(_TENSOR_SHAPE, size) for size in value.shape)
    return shape + _field(_TENSOR_TYPE, _TYPES[value.dtype]) + _field(_TENSOR_NAME, name.encode()) + _field(_TENSOR_RAW, value.tobytes())


def _value(name: str, dtype: Any, shape: Sequence[int | str]) -> bytes:
    """A ValueInfoProto: the name and, three messages deep, type and sizes."""
    sizes = b"".join(_field(1, _field(1, size) if isinstance(size, int) else _field(2, size.encode())) for size in shape)
    tensor = _field(1, _TYPES[np.dtype(dtype)]) + _field(2, sizes)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


# --- protobuf ------------------------------------------------------------------------------------------------------------------


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    place = 0
    while place < len(message):
        key, place = _read_varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _read_varint(message, place)
            yield number, value
        else:
            size, place = _read_varint(message, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
            yield number, message[place : place + size]
            place += size


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        digit = message[place]
        value |= (digit & 127) << shift
        place, shift = place + 1, shift + 7
        if digit < 128:
            return value, place


def _only(message: bytes, number: int) -> bytes:
    return bytes(dict(_fields(message))[number])
