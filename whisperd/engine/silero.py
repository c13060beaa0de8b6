"""silero: how likely it is that somebody speaks, for each 32 ms.

Owns: the Silero network that comes with faster-whisper, its memory carried from block to block, so that its answers are those of one
run over the whole recording. The convolutions of the original work on four columns at a time, where a processor's vector holds sixteen:
here three frames lie side by side, in half the time. The same sums in the same order give the same bits; that is checked once in each
process, and where it does not hold the original runs. Does not fail.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from whisperd.engine import onnx

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAME = 512  # samples for one probability
CONTEXT = 64  # samples before a frame that the network hears again
UNITS = 128  # of its memory
_HEARD = CONTEXT + FRAME
_MIRRORED = 64  # samples behind a frame, its own end mirrored
_PLACE = 768  # samples that one frame takes up in a line: 6 columns of 128, of which 4 are its own and 2 keep it from the next
_ABREAST = 3  # frames in a line: 16 columns. With more than 32 the sums would be split, and come out otherwise
_COLUMNS = 6 * _ABREAST - 2
_WEIGHTS = "encoder.conv_layers.{}.weight", "encoder.conv_layers.{}.bias"
_BASIS = "encoder.feature_extractor.forward_basis_buffer"
_LSTM = "onnx::LSTM_209", "onnx::LSTM_210", "onnx::LSTM_211"
_LAST = "decoder.conv1d.weight", "decoder.conv1d.bias"


class Memory(NamedTuple):
    """What the network remembers of the frames before: two vectors of its own, and the last samples."""

    h: NDArray[np.float32]
    c: NDArray[np.float32]
    context: NDArray[np.float32]


class Answers(NamedTuple):
    """Probabilities, and what is remembered now."""

    probabilities: NDArray[np.float32]
    h: NDArray[np.float32]
    c: NDArray[np.float32]


class Silero:
    """Speech probabilities of one stream. All streams of a process share one network."""

    def __init__(self, memory: bytes | None = None) -> None:
        """memory: of another, from which this one goes on. Raises ValueError when it is none."""
        kept = np.zeros(2 * UNITS + CONTEXT, dtype=np.float32) if memory is None else np.frombuffer(memory, dtype=np.float32)
        h, c = kept[: 2 * UNITS].reshape(2, 1, 1, UNITS)
        self._memory = Memory(h, c, kept[2 * UNITS :].reshape(CONTEXT))

    def probabilities(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """One probability for each frame; the number of samples must be a multiple of FRAME, and not 0."""
        frames = samples.reshape(-1, FRAME)
        answers = network()(placed(frames, self._memory.context), len(frames), self._memory)
        self._memory = Memory(answers.h, answers.c, frames[-1, -CONTEXT:].copy())
        return answers.probabilities

    def memory(self) -> bytes:
        """What another needs to go on from here: 1280 bytes."""
        return b"".join(part.tobytes() for part in self._memory)


def placed(frames: NDArray[np.float32], context: NDArray[np.float32]) -> NDArray[np.float32]:
    """Frames, each with what was before it and its mirrored end, side by side in lines: [lines, _ABREAST, _PLACE]."""
    lines = np.zeros((-(-len(frames) // _ABREAST), _ABREAST, _PLACE), dtype=np.float32)
    places = lines.reshape(-1, _PLACE)[: len(frames)]
    places[0, :CONTEXT] = context
    places[1:, :CONTEXT] = frames[:-1, -CONTEXT:]
    places[:, CONTEXT:_HEARD] = frames
    places[:, _HEARD : _HEARD + _MIRRORED] = frames[:, -2 : -2 - _MIRRORED : -1]
    return lines


class Original:
    """The network as it comes."""

    def __init__(self) -> None:
        from faster_whisper.vad import get_vad_model

        self._session: Any = get_vad_model().session

    def __call__(self, lines: NDArray[np.float32], count: int, memory: Memory) -> Answers:
        heard = lines.reshape(-1, _PLACE)[:count, :_HEARD]
        answers, h, c = self._session.run(None, {"input": np.ascontiguousarray(heard), "h": memory.h, "c": memory.c})
        return Answers(answers.reshape(-1), h, c)


class Abreast:
    """The same network, with `_ABREAST` frames in a line. Raises what onnxruntime raises, LookupError, OSError."""

    def __init__(self) -> None:
        import faster_whisper

        with open(os.path.join(os.path.dirname(faster_whisper.__file__), "assets", "silero_vad_v6.onnx"), "rb") as file:
            original = file.read()
        onnxruntime: Any = importlib.import_module("onnxruntime")  # its types leave out what it exports
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        self._session: Any = onnxruntime.InferenceSession(abreast(original), options, providers=["CPUExecutionProvider"])

    def __call__(self, lines: NDArray[np.float32], count: int, memory: Memory) -> Answers:
        line = np.ascontiguousarray(lines.reshape(len(lines), 1, -1)[:, :, : (_COLUMNS + 1) * 128])
        inputs = {"line": line, "count": np.array([count], dtype=np.int64), "h": memory.h, "c": memory.c}
        return Answers(*self._session.run(None, inputs))


@functools.cache
def network() -> Original | Abreast:
    """The network of this process: the faster one, if it answers a trial bit for bit as the original does."""
    original = Original()
    try:
        fast = Abreast()
        return fast if _same(fast, original) else original
    except Exception:  # noqa: BLE001 - whatever is unlike what we know, of the network or of onnxruntime: the original is always right
        return original


def _same(one: Original | Abreast, other: Original | Abreast) -> bool:
    """Whether two networks answer alike to noise of growing loudness, of a length that leaves the last line unfilled."""
    noise = np.random.default_rng(6).standard_normal((61, FRAME)) * np.geomspace(1e-4, 1.0, 61)[:, None]
    nothing = np.zeros((1, 1, UNITS), dtype=np.float32)
    memory = Memory(nothing, nothing, np.zeros(CONTEXT, dtype=np.float32))
    lines = placed(noise.astype(np.float32), memory.context)
    return all(np.array_equal(mine, its) for mine, its in zip(one(lines, 61, memory), other(lines, 61, memory), strict=True))


def abreast(original: bytes) -> bytes:
    """The ONNX file of the network with lines of frames, made from the weights of the original file. Raises LookupError, ValueError.

    "line" is [lines, 1, samples]; "count" is how many frames there are in all lines, since the last line may not be full.
    """
    found = onnx.weights_of(original)
    names = [_BASIS, *(name.format(layer) for layer in range(4) for name in _WEIGHTS), *_LSTM, *_LAST]
    own = np.resize([1, 1, 1, 1, 0, 0], _COLUMNS).astype(np.float32)  # silence between the frames, as at the end of one
    integers = {"0": [0], "1": [1], "2": [2], "3": [3], "129": [129], "258": [258], "all": [-1]}
    shapes = {"one more": [0, 0, 0, 0, 0, 1], "apart": [0, 64, _ABREAST, 3], "frames": [-1, 64, 2]}
    constants = {
        **{name: found[name] for name in names},
        **{name: np.array(value, dtype=np.int64) for name, value in (integers | shapes).items()},
        "own": own,
        "square": np.array(2.0, dtype=np.float32),
    }
    state: onnx.Shape = (np.float32, (1, 1, UNITS))
    inputs: dict[str, onnx.Shape] = {
        "line": (np.float32, ("lines", 1, (_COLUMNS + 1) * 128)),
        "count": (np.int64, (1,)),
        "h": state,
        "c": state,
    }
    outputs: dict[str, onnx.Shape] = {"answers": (np.float32, ("frames",)), "hn": state, "cn": state}
    return onnx.model([*_spectrum(), *_encoder(), *_decoder()], constants, inputs, outputs, opset=onnx.opset_of(original))


def _spectrum() -> list[bytes]:
    return [
        _convolution("line", "spectrum", (_BASIS,), width=256, stride=128, pad=0),
        onnx.node("Slice", ["spectrum", "0", "129", "1"], ["real"]),
        onnx.node("Slice", ["spectrum", "129", "258", "1"], ["imaginary"]),
        onnx.node("Pow", ["real", "square"], ["real2"]),
        onnx.node("Pow", ["imaginary", "square"], ["imaginary2"]),
        onnx.node("Add", ["real2", "imaginary2"], ["power"]),
        onnx.node("Sqrt", ["power"], ["magnitude"]),
        onnx.node("Mul", ["magnitude", "own"], ["heard"]),
    ]


def _encoder() -> list[bytes]:
    """Two layers over lines, 16 columns and then 8; each frame's two columns of those are then taken apart for the last two layers."""
    return [
        *_layer(0, "heard", "first", stride=1),
        onnx.node("Mul", ["first", "own"], ["first own"]),
        *_layer(1, "first own", "second", stride=2),
        onnx.node("Pad", ["second", "one more"], ["second padded"]),
        onnx.node("Reshape", ["second padded", "apart"], ["second apart"]),
        onnx.node("Slice", ["second apart", "0", "2", "3"], ["second own"]),
        onnx.node("Transpose", ["second own"], ["second turned"], perm=[0, 2, 1, 3]),
        onnx.node("Reshape", ["second turned", "frames"], ["second of all"]),
        onnx.node("Slice", ["second of all", "0", "count", "0"], ["second of each"]),
        *_layer(2, "second of each", "third", stride=2),
        *_layer(3, "third", "fourth", stride=1),
    ]


def _decoder() -> list[bytes]:
    return [
        onnx.node("Transpose", ["fourth"], ["steps"], perm=[0, 2, 1]),
        onnx.node("LSTM", ["steps", *_LSTM, "", "h", "c"], ["recalled", "hn", "cn"], hidden_size=UNITS),
        onnx.node("Squeeze", ["recalled", "1"], ["recalled flat"]),
        onnx.node("Relu", ["recalled flat"], ["lit"]),
        onnx.node("Transpose", ["lit"], ["lit turned"], perm=[1, 2, 0]),
        _convolution("lit turned", "leaning", _LAST, width=1, stride=1, pad=0),
        onnx.node("Sigmoid", ["leaning"], ["likelihood"]),
        onnx.node("Reshape", ["likelihood", "all"], ["answers"]),
    ]


def _layer(number: int, source: str, target: str, *, stride: int) -> list[bytes]:
    names = tuple(name.format(number) for name in _WEIGHTS)
    return [
        _convolution(source, f"{target} bare", names, width=3, stride=stride, pad=1),
        onnx.node("Relu", [f"{target} bare"], [target]),
    ]


def _convolution(source: str, target: str, weights: tuple[str, ...], *, width: int, stride: int, pad: int) -> bytes:
    return onnx.node("Conv", [source, *weights], [target], kernel_shape=[width], strides=[stride], pads=[pad, pad], dilations=[1], group=1)
