"""model: where the one model of this process comes from, how it is loaded, given back and loaded again.

Owns: names → directories → `Loaded`. A model is looked for on disk first; the network is used only to fetch one that is absent, and
never when `offline`. Fails with `ModelAbsent` (waited for: no file is to blame), `ModelUnusable`, its kind `ModelTooLarge`, and
`CudaUnusable`.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

import numpy as np
from loguru import logger

from whisperd.engine import cuda, memory, vram
from whisperd.engine.torch_encoder import TorchEncoder, cpu_flags, pays, worth_trying
from whisperd.engine.weights import WeightsUnreadable
from whisperd.errors import WhisperdError
from whisperd.vocabulary import JobOptions

if TYPE_CHECKING:
    from whisperd.wire import LoadModel

DEMO = "demo"
NEEDED = ("model.bin", "config.json", "tokenizer.json")
HASHED_WHOLE_MAX_BYTES = 64 << 20
FRAMES = 3000  # mel frames (10 ms) of a full window
MEASURED_FRAMES = 1000  # of the window that encoders are compared on: a ninth of a full one's time
UNLOAD_MAX_S = 10.0
UNLOAD_LOOK_S = 0.001


class ModelAbsent(WhisperdError):
    """The model is not on this machine and cannot be fetched."""

    code = "model_absent"
    recoverable = True


class ModelUnusable(WhisperdError):
    """The model is there, but it cannot be loaded as asked."""

    code = "model_unusable"
    recoverable = True


class ModelTooLarge(ModelUnusable):
    """There is not enough memory left for the model, on the GPU or in the machine."""

    code = "out_of_memory"


@dataclass(eq=False)
class Loaded:
    """A model in memory, with what a transcript's provenance says of it. For one thread: CTranslate2's `encode` takes no lock.

    `whisper` is a faster-whisper `WhisperModel`. `encoder` is "ctranslate2" or "torch"; then `torch_encoder` stands in for the model's own.
    `stacked` says that windows are encoded several at a time, which gains nothing on a CPU.
    """

    whisper: Any
    name: str
    directory: str
    revision: str
    device: str
    compute_type: str
    cpu_threads: int
    n_mels: int
    load_s: float
    warm_up_s: float = 0.0
    encoder: str = "ctranslate2"
    torch_encoder: TorchEncoder | None = None
    holding: vram.Holding | None = None  # of the GPU's memory; None on a CPU or where its driver does not say

    @property
    def stacked(self) -> bool:
        return self.device == "cuda"

    def unload(self) -> None:
        """Give the model's memory back until `reload`. Raises ModelUnusable when the model is still at work after a while."""
        if self.whisper.model is not None:
            self._unload_ctranslate2(self.whisper.model)
        self.torch_encoder = None
        memory.release_freed_memory()

    def _unload_ctranslate2(self, model: Any) -> None:
        until = time.monotonic() + UNLOAD_MAX_S
        model.unload_model()
        while model.model_is_loaded:  # a batch is counted a moment longer than its call takes, and meanwhile nothing is unloaded
            if time.monotonic() > until:
                raise ModelUnusable(
                    f"cannot unload the model {self.name}: it has been at work for {UNLOAD_MAX_S:g} s",
                    hint="it is given back when the engine ends",
                )
            time.sleep(UNLOAD_LOOK_S)
            model.unload_model()

    def reload(self) -> None:
        """Have the model in memory again; nothing where it is. Raises ModelUnusable, also when its files are others by now."""
        try:
            if self.whisper.model is None:
                self._see_that_files_are_the_same()
                self.whisper.model = self._read_anew()
            elif not self.whisper.model.model_is_loaded:
                self._see_that_files_are_the_same()
                self.whisper.model.load_model()
            if self.encoder == "torch" and self.torch_encoder is None:
                self.torch_encoder = TorchEncoder(self.directory, self.cpu_threads)
        except (RuntimeError, ValueError, OSError, MemoryError, WeightsUnreadable) as error:
            raise _unusable(self.name, self.directory, self.device, self.compute_type, error) from error

    def reseed(self, seed: int) -> None:
        """Make the samples drawn from here on depend on `seed` (32 bits) alone. Raises ModelUnusable.

        CTranslate2 seeds the generator of each of its threads once, at its first use, so this takes new threads: the model is loaded
        again, which costs about as much as a window (docs/decisions/0010). Where that fails there is no model until `reload`.
        """
        import ctranslate2

        self.whisper.model = None  # first, so that both never need memory at a time
        ctranslate2.set_random_seed(seed)  # type: ignore[attr-defined]
        self.whisper.model = self._read_anew()

    def _read_anew(self) -> Any:
        return _reader(self.directory, device=self.device, compute_type=self.compute_type, intra_threads=self.cpu_threads)

    def _see_that_files_are_the_same(self) -> None:
        if revision_of(self.directory) != self.revision:
            raise ModelUnusable(
                f"cannot load the model {self.name} again: the files in {self.directory} were replaced",
                hint="the engine must start anew: its transcripts would name another model than the one that wrote them",
            )

    def vram_peak_mib(self) -> int | None:
        """The most that this process held of the GPU's memory since the last call, context included; None as `holding`."""
        return vram.peak_mib(self.holding) if self.holding else None

    def vram_used_mib(self) -> int | None:
        """What all processes hold of the GPU's memory; None on a CPU."""
        return vram.used_mib() if self.device == "cuda" else None

    def memory_told(self) -> str:
        """What there is of memory, for a sentence."""
        return vram.told(self.holding) if self.device == "cuda" else f"this process holds {memory.memory_rss_mib()} MiB"


def prepare(request: LoadModel) -> None:
    """What must stand before this process has threads. Raises CudaUnusable."""
    if request.device == "cuda":
        for name, value in cuda.environment(request.cache_dir).items():
            os.environ.setdefault(name, value)
        cuda.prepare()
    else:
        memory.keep_freed_memory()


def load(request: LoadModel) -> Loaded:
    """Find, fetch when needed, load, and do once what would hold up the first job. Raises ModelAbsent, ModelUnusable, CudaUnusable."""
    began = time.monotonic()
    prepare(request)
    directory = locate(request.model, request.cache_dir, offline=request.offline)
    before = vram.look() if request.device == "cuda" else None
    try:
        whisper, revision = _read(request, directory)
        loaded = Loaded(
            whisper=whisper,
            name=request.model,
            directory=directory,
            revision=revision,
            device=str(whisper.model.device),
            compute_type=str(whisper.model.compute_type),
            cpu_threads=request.cpu_threads,
            n_mels=int(whisper.model.n_mels),
            load_s=time.monotonic() - began,
        )
        _warm_up(loaded, request.encoder)
        loaded.holding = vram.settle(before) if before else None
    except (RuntimeError, ValueError, OSError, MemoryError, WeightsUnreadable) as error:
        raise _unusable(request.model, directory, request.device, request.compute_type, error) from error
    return loaded


def _unusable(model: str, directory: str, device: str, compute_type: str, error: Exception) -> ModelUnusable:
    what = f"cannot load the model {model} from {directory} on {device} as {compute_type}: {str(error) or type(error).__name__}"
    if memory.is_out_of_memory(error):
        room = f"; {vram.told(None)}" if device == "cuda" else ""
        return ModelTooLarge(what + room, hint="free memory, or use fewer workers, a lighter compute type or a smaller model")
    return ModelUnusable(
        what, hint="check engine.device and engine.compute_type; if files are damaged, remove the directory and let it be fetched again"
    )


def _reader(directory: str, *, device: str, compute_type: str, intra_threads: int) -> Any:
    import ctranslate2

    return ctranslate2.models.Whisper(  # type: ignore[attr-defined]
        directory, device=device, device_index=cuda.DEVICE_INDEX, compute_type=compute_type, intra_threads=intra_threads
    )


def _read(request: LoadModel, directory: str) -> tuple[Any, str]:
    """A WhisperModel and its revision. What needs no GIL, CTranslate2's reading and the digest, goes on beside the rest."""
    with ThreadPoolExecutor(2) as readers:
        digest = readers.submit(revision_of, directory)
        reading = readers.submit(
            _reader,
            directory,
            device=request.device,
            compute_type=request.compute_type,
            intra_threads=request.cpu_threads,
        )
        from faster_whisper import WhisperModel
        from faster_whisper.feature_extractor import FeatureExtractor
        from faster_whisper.utils import get_logger
        from tokenizers import Tokenizer

        whisper: Any = object.__new__(WhisperModel)  # its constructor does all this one after the other
        whisper.logger = get_logger()  # type: ignore[no-untyped-call]
        try:
            whisper.hf_tokenizer = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing more special
            raise RuntimeError(f"its tokenizer.json cannot be used: {error}") from error
        whisper.feat_kwargs = whisper._get_feature_kwargs(directory)
        whisper.feature_extractor = extractor = FeatureExtractor(**whisper.feat_kwargs)  # type: ignore[no-untyped-call]
        whisper.input_stride = 2
        whisper.num_samples_per_token = extractor.hop_length * whisper.input_stride
        whisper.frames_per_second = extractor.sampling_rate // extractor.hop_length
        whisper.tokens_per_second = extractor.sampling_rate // whisper.num_samples_per_token
        whisper.time_precision = 0.02
        whisper.max_length = 448
        whisper.model = reading.result()
        return whisper, digest.result()


def _warm_up(loaded: Loaded, encoder: str) -> None:
    """On a GPU, one window of silence through the model: kernels are compiled, cuBLAS starts. On a CPU, the choice of the encoder.

    A window of silence costs a CPU three times what the first job saves by it (0.144 s for 0.05 s, demo model): nothing but page
    faults, which that job pays once.
    """
    began = time.monotonic()
    if loaded.device == "cuda":
        _run_silence(loaded)
    elif encoder == "torch":
        loaded.encoder, loaded.torch_encoder = "torch", TorchEncoder(loaded.directory, loaded.cpu_threads)
    elif encoder == "auto" and worth_trying(cpu_flags()):
        _try_torch(loaded)
    loaded.warm_up_s = time.monotonic() - began


def _run_silence(loaded: Loaded) -> None:
    """The first job's steps, with the options that it has when nothing else is set."""
    from ctranslate2 import StorageView  # type: ignore[attr-defined]

    model = loaded.whisper.model
    encoded = model.encode(StorageView.from_array(np.zeros((1, loaded.n_mels, FRAMES), dtype=np.float32)))
    if model.is_multilingual:
        model.detect_language(encoded)
    start = loaded.whisper.hf_tokenizer.token_to_id("<|startoftranscript|>")
    model.generate(encoded, [[start]], beam_size=JobOptions().beam_size, max_length=16, return_scores=True, return_no_speech_prob=True)


def _try_torch(loaded: Loaded) -> None:
    """Use PyTorch's encoder if it is clearly the faster one; the log says by how much."""
    try:
        encoder = TorchEncoder(loaded.directory, loaded.cpu_threads)
    except WeightsUnreadable as error:  # CTranslate2 could read them: older files are laid out otherwise
        logger.info(f"the encoder stays CTranslate2's: {error}")
        return
    measured = pays(loaded.whisper.model, encoder, np.zeros((1, loaded.n_mels, MEASURED_FRAMES), dtype=np.float32))
    if measured.pays:
        loaded.encoder, loaded.torch_encoder = "torch", encoder
    logger.info(
        f"the encoder is {loaded.encoder}: {MEASURED_FRAMES // 100} s of sound take CTranslate2 {measured.ctranslate2_s:.3f} s "
        f"and PyTorch {measured.torch_s:.3f} s of a processor"
    )


def locate(model: str, cache_dir: str, *, offline: bool) -> str:
    """The directory of a model: the embedded one, a directory, or a name or repository in the cache. Raises ModelAbsent."""
    if model == DEMO:
        with as_file(files("whisperd").joinpath("share", "demo_model")) as path:
            return str(path)
    if os.path.isabs(model):
        return _directory(model)
    cached = _from_cache(model, cache_dir) or _from_hub(model, cache_dir, local_files_only=True)
    if isinstance(cached, str):
        return cached
    if offline:
        raise _absent(model, cache_dir, "engine.offline is set, so it is not fetched")
    fetched = _from_hub(model, cache_dir, local_files_only=False)
    if isinstance(fetched, str):
        return fetched
    raise _absent(model, cache_dir, f"it cannot be fetched ({_first_line(fetched)})")


def _is_whole(directory: str) -> bool:
    return all(os.path.isfile(os.path.join(directory, name)) for name in NEEDED)


def _directory(path: str) -> str:
    if _is_whole(path):
        return path
    absent = next(name for name in NEEDED if not os.path.isfile(os.path.join(path, name)))
    raise ModelAbsent(
        f"cannot load the model {path}: there is no {absent} in that directory",
        hint="engine.model must be a directory with a CTranslate2 Whisper model (model.bin, config.json, tokenizer.json)",
    )


def _from_cache(model: str, cache_dir: str) -> str | None:
    """A copy that is whole, without the hub's client, whose import takes a tenth of a second."""
    from faster_whisper import utils

    repository = getattr(utils, "_MODELS", {}).get(model, model)
    home = os.path.join(cache_dir, "models--" + repository.replace("/", "--"))
    try:
        with open(os.path.join(home, "refs", "main"), encoding="ascii") as reference:
            directory = os.path.join(home, "snapshots", reference.read().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return directory if _is_whole(directory) else None


def _from_hub(model: str, cache_dir: str, *, local_files_only: bool) -> str | Exception:
    from faster_whisper.utils import download_model

    try:
        directory = str(download_model(model, cache_dir=cache_dir, local_files_only=local_files_only))
    except Exception as error:  # noqa: BLE001 - the hub client raises dozens of kinds; each means "not there", and is quoted
        return error
    return directory if _is_whole(directory) else FileNotFoundError("the copy in the cache is not whole")


def _absent(model: str, cache_dir: str, why: str) -> ModelAbsent:
    return ModelAbsent(
        f"the model {model} is not in {cache_dir} and {why}",
        hint=f"give this machine access to the model hub once, or copy the model's files there, or set engine.model to a directory "
        f"with a CTranslate2 Whisper model; files wait meanwhile (looked in {cache_dir})",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def revision_of(directory: str) -> str:
    """The hub's commit when the directory is one of its snapshots, else a digest of the weights (of their head and size when large)."""
    if os.path.basename(os.path.dirname(directory)) == "snapshots":
        return os.path.basename(directory)
    with open(os.path.join(directory, "model.bin"), "rb") as weights:
        size = os.fstat(weights.fileno()).st_size
        digest = hashlib.sha256(weights.read(HASHED_WHOLE_MAX_BYTES))
    digest.update(str(size).encode())
    return digest.hexdigest()[:16]
