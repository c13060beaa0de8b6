"""The encoder in PyTorch: the weights are read as they were written, and the decoder cannot tell whose output it is given."""

from __future__ import annotations

import csv
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from whisperd.engine import model, torch_encoder, weights
from whisperd.engine.model import ModelUnusable
from whisperd.engine.torch_encoder import Measured, TorchEncoder
from whisperd.engine.weights import WeightsUnreadable
from whisperd.wire import LoadModel

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "whisperd" / "share" / "demo_model"
CLIPS = ROOT / "whisperd" / "share" / "clips"

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int8", "int8_float16", "int8_bfloat16", "int16")


def request(**changes: Any) -> LoadModel:
    usual: dict[str, Any] = {
        "model": "demo",
        "device": "cpu",
        "compute_type": "int8",
        "gpu": "",
        "cpu_threads": 1,
        "batch": 4,
        "encoder": "torch",
        "cache_dir": "/nonexistent",
        "offline": True,
        "duration_max_s": 86_400.0,
        "channels_max": 8,
        "rate_max_hz": 192_000,
    }
    return LoadModel(**{**usual, **changes})


def random_model(
    directory: Path, quantization: str, *, width: int = 64, layers: int = 2, heads: int = 2, n_mels: int = 80
) -> dict[str, Any]:
    """A Whisper model with random weights, as CTranslate2's own converter writes it; the encoder's tensors before quantization."""
    from ctranslate2.specs.whisper_spec import WhisperSpec

    draw = np.random.default_rng(3)

    def tensor(*shape: int) -> Any:
        return draw.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 10))

    def linear(spec: Any, out: int, into: int) -> None:
        spec.weight, spec.bias = tensor(out, into), tensor(out)

    def norm(spec: Any) -> None:
        spec.gamma, spec.beta = 1 + tensor(width), tensor(width)

    def block(spec: Any, *, decodes: bool) -> None:
        for attention in (spec.self_attention, spec.attention) if decodes else (spec.self_attention,):
            norm(attention.layer_norm)
            shapes = (
                [(3 * width, width), (width, width)] if len(attention.linear) == 2 else [(width, width), (2 * width, width), (width, width)]
            )
            for step, shape in zip(attention.linear, shapes, strict=True):
                linear(step, *shape)
        norm(spec.ffn.layer_norm)
        linear(spec.ffn.linear_0, 4 * width, width)
        linear(spec.ffn.linear_1, width, 4 * width)

    spec = WhisperSpec(layers, heads, layers, heads)
    for convolution, into in ((spec.encoder.conv1, n_mels), (spec.encoder.conv2, width)):
        convolution.weight, convolution.bias = tensor(width, into, 3), tensor(width)
    spec.encoder.position_encodings.encodings = tensor(1500, width)
    spec.decoder.position_encodings.encodings = tensor(448, width)
    words = [f"w{number}" for number in range(20)] + [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|nospeech|>",
        "<|notimestamps|>",
        "<|0.00|>",
    ]
    spec.decoder.embeddings.weight = tensor(len(words), width)
    spec.decoder.projection.weight = tensor(len(words), width)
    for side in (spec.encoder, spec.decoder):
        norm(side.layer_norm)
        for layer in side.layer:
            block(layer, decodes=side is spec.decoder)
    spec.register_vocabulary(words)
    spec.validate()
    written = {
        name.removeprefix("encoder/"): value.numpy().copy() for name, value in spec.variables().items() if name.startswith("encoder/")
    }
    spec.optimize(quantization)
    directory.mkdir()
    spec.save(str(directory))
    return written


def storage(values: Any) -> Any:
    from ctranslate2 import StorageView

    return StorageView.from_array(np.ascontiguousarray(values))


def core(directory: Path, compute_type: str) -> Any:
    import ctranslate2

    return ctranslate2.models.Whisper(str(directory), device="cpu", compute_type=compute_type, intra_threads=1)


def relative_error(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# --- weights -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_are_read_as_they_were_written(tmp_path: Path, quantization: str) -> None:
    """Every tensor of the encoder, in every precision that CTranslate2 stores, within that precision."""
    written = random_model(tmp_path / "m", quantization)
    read = weights.read(str(tmp_path / "m"), "encoder")
    assert read.keys() == written.keys()
    bound = {"float32": 0, "float16": 1e-3, "bfloat16": 5e-3, "int8": 1e-2, "int8_float16": 1e-2, "int8_bfloat16": 1e-2, "int16": 5e-3}
    for name, values in written.items():
        assert read[name].dtype == np.float32
        assert np.max(np.abs(read[name] - values), initial=0) <= bound[quantization] * np.max(np.abs(values)), name


def test_a_tensor_stored_once_under_two_names_is_read_under_both() -> None:
    """Tied weights are written as an alias; the alias has no scale of its own."""
    read = weights.read(str(DEMO), "decoder")
    assert np.array_equal(read["projection/weight"], read["embeddings/weight"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "cannot read the weights"),
        (lambda data: b"", "cannot read the weights"),
        (lambda data: struct.pack("<I", 5) + data[4:], "binary version is 5"),
    ],
)
def test_damaged_weights_are_unreadable(tmp_path: Path, damage: Any, says: str) -> None:
    """Cut short, empty, of another version: said so, never read as something."""
    (tmp_path / "model.bin").write_bytes(damage((DEMO / "model.bin").read_bytes()))
    with pytest.raises(WeightsUnreadable, match=says):
        weights.read(str(tmp_path), "encoder")


def test_weights_of_something_else_make_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without the tensors of Whisper's encoder is said to be one, with the first that is absent."""
    monkeypatch.setattr(weights, "read", lambda *_: {"num_heads": np.float32(2)})
    with pytest.raises(WeightsUnreadable, match=r"there is no .*conv1/weight"):
        TorchEncoder(str(DEMO), 1)


# --- numbers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [3000, 1000])
def test_it_computes_what_the_demo_models_encoder_does(frames: int) -> None:
    """Two windows at once, full and short: within 3 % of CTranslate2 in float32, closer than its own int8."""
    features = np.random.default_rng(1).standard_normal((2, 80, frames), dtype=np.float32)
    exact = core(DEMO, "float32").encode(storage(features))
    assert exact.shape == [2, frames // 2, 128]
    error = relative_error(TorchEncoder(str(DEMO), 1).encode(features), exact)
    assert error < 0.03
    assert error < relative_error(core(DEMO, "int8").encode(storage(features)), exact)


@pytest.mark.parametrize(("width", "layers", "heads", "n_mels"), [(64, 1, 1, 80), (96, 3, 6, 128), (384, 4, 6, 80)])
def test_it_computes_what_any_encoder_does(tmp_path: Path, width: int, layers: int, heads: int, n_mels: int) -> None:
    """Other widths, depths, heads and mel bins (large-v3 has 128)."""
    random_model(tmp_path / "m", "int8_float16", width=width, layers=layers, heads=heads, n_mels=n_mels)
    features = np.random.default_rng(2).standard_normal((1, n_mels, 400), dtype=np.float32)
    exact = core(tmp_path / "m", "float32").encode(storage(features))
    assert relative_error(TorchEncoder(str(tmp_path / "m"), 1).encode(features), exact) < 0.03


def clips() -> Iterator[str]:
    with open(CLIPS / "clips.csv", newline="") as file:
        yield from (row["file"] for row in csv.DictReader(file))


def test_every_clip_reads_the_same() -> None:
    """Texts decoded from either encoder's output differ in at most one word of a clip."""
    from faster_whisper import decode_audio
    from faster_whisper.audio import pad_or_trim

    whisper = model.load(request(encoder="ctranslate2")).whisper
    encoder = TorchEncoder(str(DEMO), 1)
    start = whisper.hf_tokenizer.token_to_id("<|startoftranscript|>")
    for clip in clips():
        features = pad_or_trim(whisper.feature_extractor(decode_audio(str(CLIPS / clip))[: 30 * 16_000]))[None]
        texts = [
            whisper.hf_tokenizer.decode(whisper.model.generate(output, [[start]], beam_size=5)[0].sequences_ids[0]).split()
            for output in (whisper.model.encode(storage(features)), encoder.encode(np.ascontiguousarray(features)))
        ]
        assert texts[0], clip
        assert words_between(*texts) <= 1, (clip, texts)


def words_between(one: list[str], other: list[str]) -> int:
    """Words to change, add or leave out to make one text of the other."""
    row = list(range(len(other) + 1))
    for number, word in enumerate(one, start=1):
        before, row[0] = row[0], number
        for place, theirs in enumerate(other, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != theirs))
    return row[-1]


# --- when it is used -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "worth"), [({"amx_bf16", "avx512_bf16"}, True), ({"avx512_bf16"}, False), (set(), False)])
def test_only_a_cpu_with_amx_is_worth_trying(flags: set[str], worth: bool) -> None:
    assert torch_encoder.worth_trying(frozenset(flags)) is worth


def test_the_flags_of_this_cpu_are_read() -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as processors:
        assert not any(line.startswith("flags") for line in processors) or torch_encoder.cpu_flags()


@pytest.mark.parametrize(("torch_s", "pays"), [(0.3, True), (0.79, True), (0.81, False), (2.0, False)])
def test_the_measurement(torch_s: float, pays: bool) -> None:
    """The first run of each counts for nothing, a single slow one neither; clearly faster is below 0.8 of the time."""
    now = [0.0]

    def encoder_taking(*seconds: float) -> Any:
        left = list(seconds)

        def encode() -> None:
            now[0] += left.pop(0)

        return encode

    ours, theirs = encoder_taking(1.0, 1.0, 9.0, 1.0), encoder_taking(50.0, torch_s, torch_s, 7.0)
    measured = torch_encoder.compare(ours, theirs, lambda: now[0])
    assert measured == (pytest.approx(1.0), pytest.approx(torch_s), pays)


def test_both_encoders_are_measured() -> None:
    features = np.zeros((1, 80, 200), dtype=np.float32)
    measured = torch_encoder.pays(core(DEMO, "int8"), TorchEncoder(str(DEMO), 1), features)
    assert measured.ctranslate2_s > 0
    assert measured.torch_s > 0


@pytest.mark.parametrize("pays", [True, False])
def test_auto_follows_the_measurement(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """On a CPU that is worth trying, the faster encoder is chosen."""
    monkeypatch.setattr(model, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    monkeypatch.setattr(model, "pays", lambda *_: Measured(1.0, 0.5 if pays else 1.5, pays))
    loaded = model.load(request(encoder="auto"))
    assert loaded.encoder == ("torch" if pays else "ctranslate2")
    assert (loaded.torch_encoder is not None) is pays


def test_it_goes_and_comes_back_with_the_model() -> None:
    """Asked for, it is used without a measurement; unloading gives its memory back as well."""
    loaded = model.load(request())
    features = np.zeros((1, 80, 300), dtype=np.float32)
    assert loaded.encoder == "torch"
    assert loaded.torch_encoder is not None
    first = np.asarray(loaded.torch_encoder.encode(features))
    loaded.unload()
    assert loaded.torch_encoder is None
    loaded.reload()
    assert loaded.torch_encoder is not None
    assert np.array_equal(np.asarray(loaded.torch_encoder.encode(features)), first)


def test_a_reload_that_failed_half_way_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """CTranslate2's part came back, PyTorch's did not: the next try must not pass the model's own encoder off as PyTorch's."""
    loaded = model.load(request())
    loaded.unload()

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(ModelUnusable, match="MemoryError"):
        patch.setattr(model, "TorchEncoder", no_memory)
        loaded.reload()
    loaded.reload()
    assert loaded.torch_encoder is not None


def test_weights_that_it_cannot_read_make_the_model_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was asked for by name; "auto" goes on without it."""
    shutil.copytree(DEMO, tmp_path / "copy")

    def unreadable(*_: object) -> None:
        raise WeightsUnreadable("cannot read the weights")

    monkeypatch.setattr(weights, "read", unreadable)
    monkeypatch.setattr(model, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    with pytest.raises(ModelUnusable, match="cannot read the weights"):
        model.load(request(model=str(tmp_path / "copy")))
    assert model.load(request(model=str(tmp_path / "copy"), encoder="auto")).encoder == "ctranslate2"


def test_torch_is_imported_by_the_encoder_alone() -> None:
    """The modules themselves cost nothing."""
    code = "import sys; import whisperd.engine.torch_encoder, whisperd.engine.weights; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
