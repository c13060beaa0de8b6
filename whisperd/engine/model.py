"""model: where the one model of this process comes from, and how it is loaded.

Owns: names → directories → `WhisperModel`. A model is looked for on disk first; the network is used only to fetch one that is
absent, and never when `offline`. Fails with `ModelAbsent` (waited for: no file is to blame) and `ModelUnusable`.
"""

from __future__ import annotations

import hashlib
import os
import time
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, NamedTuple

from whisperd.errors import WhisperdError

if TYPE_CHECKING:
    from whisperd.wire import LoadModel

DEMO = "demo"
HASHED_WHOLE_MAX_BYTES = 64 << 20


class ModelAbsent(WhisperdError):
    """The model is not on this machine and cannot be fetched."""

    code = "model_absent"
    recoverable = True


class ModelUnusable(WhisperdError):
    """The model is there, but it cannot be loaded as asked."""

    code = "model_unusable"
    recoverable = True


class Loaded(NamedTuple):
    """A model in memory, with what a transcript's provenance says of it."""

    whisper: Any
    name: str
    revision: str
    device: str
    compute_type: str
    load_s: float


def load(request: LoadModel) -> Loaded:
    """Find, fetch when needed, and load. Raises ModelAbsent, ModelUnusable."""
    began = time.monotonic()
    directory = locate(request.model, request.cache_dir, offline=request.offline)
    from faster_whisper import WhisperModel

    try:
        whisper = WhisperModel(
            directory,
            device=request.device,
            compute_type=request.compute_type,
            cpu_threads=request.cpu_threads,
            local_files_only=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelUnusable(
            f"cannot load the model {request.model} from {directory} on {request.device} as {request.compute_type}: {error}",
            hint="check engine.device and engine.compute_type; if files are damaged, remove the directory and let it be fetched again",
        ) from error
    return Loaded(
        whisper=whisper,
        name=request.model,
        revision=revision_of(directory),
        device=str(whisper.model.device),
        compute_type=str(whisper.model.compute_type),
        load_s=time.monotonic() - began,
    )


def locate(model: str, cache_dir: str, *, offline: bool) -> str:
    """The directory of a model: the embedded one, a directory, or a name or repository in the cache. Raises ModelAbsent."""
    if model == DEMO:
        with as_file(files("whisperd").joinpath("share", "demo_model")) as path:
            return str(path)
    if os.path.isabs(model):
        return _directory(model)
    cached = _from_hub(model, cache_dir, local_files_only=True)
    if isinstance(cached, str):
        return cached
    if offline:
        raise _absent(model, cache_dir, "engine.offline is set, so it is not fetched")
    fetched = _from_hub(model, cache_dir, local_files_only=False)
    if isinstance(fetched, str):
        return fetched
    raise _absent(model, cache_dir, f"it cannot be fetched ({_first_line(fetched)})")


def _directory(path: str) -> str:
    if os.path.isfile(os.path.join(path, "model.bin")):
        return path
    raise ModelAbsent(
        f"cannot load the model {path}: there is no model.bin in that directory",
        hint="engine.model must be a directory with a CTranslate2 Whisper model (model.bin, config.json, tokenizer.json)",
    )


def _from_hub(model: str, cache_dir: str, *, local_files_only: bool) -> str | Exception:
    from faster_whisper.utils import download_model

    try:
        directory = str(download_model(model, cache_dir=cache_dir, local_files_only=local_files_only))
    except Exception as error:  # noqa: BLE001 - the hub client raises dozens of kinds; each means "not there", and is quoted
        return error
    return directory if os.path.isfile(os.path.join(directory, "model.bin")) else FileNotFoundError("the copy in the cache is not whole")


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
