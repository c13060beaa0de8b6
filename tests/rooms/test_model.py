"""The life of the model: found, loaded, given back, loaded again; what CUDA and the allocator need before it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from whisperd.engine import cuda, model, vram
from whisperd.engine.memory import is_out_of_memory, memory_rss_mib
from whisperd.engine.model import Loaded, ModelAbsent, ModelUnusable
from whisperd.wire import LoadModel

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "whisperd" / "share" / "demo_model"

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def request(**changes: Any) -> LoadModel:
    usual: dict[str, Any] = {
        "model": "demo",
        "device": "cpu",
        "compute_type": "int8",
        "gpu": "",
        "cpu_threads": 1,
        "batch": 4,
        "encoder": "ctranslate2",
        "cache_dir": "/nonexistent",
        "offline": True,
        "duration_max_s": 86_400.0,
        "channels_max": 8,
        "rate_max_hz": 192_000,
    }
    return LoadModel(**{**usual, **changes})


def fresh(code: str, **environment: str) -> Any:
    """What `code` leaves in `answer`, run in a process of its own."""
    program = f"import json\n{code}\nprint(json.dumps(answer))"
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**ours, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def silence(frames: int = 3000) -> Any:
    from ctranslate2 import StorageView

    return StorageView.from_array(np.zeros((1, 80, frames), dtype=np.float32))


# --- where it is ---------------------------------------------------------------------------------------------------------------


def cache_with(tmp_path: Path, leave_out: str = "") -> Path:
    """A hub cache that holds the demo model under the name of another."""
    home = tmp_path / "models--Systran--faster-whisper-tiny"
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123abcd")
    for file in DEMO.iterdir():
        if file.name != leave_out:
            (snapshot / file.name).symlink_to(file)
    return snapshot


def test_a_model_in_the_cache_is_found_without_the_hub(tmp_path: Path) -> None:
    """A name and a repository lead to the same snapshot, whose commit is the revision; the hub's client is not even imported."""
    snapshot = cache_with(tmp_path)
    answer = fresh(
        "import sys; from whisperd.engine import model\n"
        f"answer = [[model.locate(name, {str(tmp_path)!r}, offline=True) for name in ('tiny', 'Systran/faster-whisper-tiny')],"
        " 'huggingface_hub._snapshot_download' in sys.modules]"
    )
    assert answer == [[str(snapshot), str(snapshot)], False]
    assert model.revision_of(str(snapshot)) == "0123abcd"


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.json"])
def test_half_a_model_in_the_cache_is_no_model(tmp_path: Path, name: str) -> None:
    """A download that was cut short is not loaded, and not taken for whole."""
    cache_with(tmp_path, leave_out=name)
    with pytest.raises(ModelAbsent, match=r"engine\.offline is set"):
        model.locate("tiny", str(tmp_path), offline=True)


def test_a_directory_must_hold_a_model(tmp_path: Path) -> None:
    """The message names the first file that is not there."""
    with pytest.raises(ModelAbsent, match=r"no model\.bin"):
        model.locate(str(tmp_path), "", offline=True)
    shutil.copytree(DEMO, tmp_path / "copy")
    assert model.locate(str(tmp_path / "copy"), "", offline=True) == str(tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(ModelAbsent, match=r"no tokenizer\.json"):
        model.locate(str(tmp_path / "copy"), "", offline=True)


# --- loading -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return model.load(request())


def test_what_is_loaded_is_a_whole_whisper_model(loaded: Loaded) -> None:
    """Although its constructor was passed by, it has the attributes that the constructor gives, and their values."""
    from faster_whisper import WhisperModel

    theirs = vars(WhisperModel(str(DEMO), device="cpu", compute_type="int8", cpu_threads=1))
    ours = vars(loaded.whisper)
    assert ours.keys() == theirs.keys()
    plain = {name: value for name, value in theirs.items() if isinstance(value, int | float | dict)}
    assert {name: ours[name] for name in plain} == plain
    assert ours["hf_tokenizer"].to_str() == theirs["hf_tokenizer"].to_str()
    assert np.array_equal(ours["feature_extractor"].mel_filters, theirs["feature_extractor"].mel_filters)


def test_it_tells_what_was_loaded(loaded: Loaded) -> None:
    assert (loaded.name, loaded.device, loaded.encoder, loaded.n_mels, loaded.stacked) == ("demo", "cpu", "ctranslate2", 80, False)
    assert loaded.torch_encoder is None
    assert (loaded.holding, loaded.vram_peak_mib(), loaded.vram_used_mib()) == (None, None, None)
    assert 0 < loaded.load_s < 60


def test_a_worker_imports_only_what_it_needs() -> None:
    """Neither a bare import nor a load with "auto" on a CPU without AMX brings in torch; codecs and Silero's runtime wait for a job."""
    answer = fresh(
        "import sys; from whisperd.engine import model; before = set(sys.modules)\n"
        "model.cpu_flags = lambda: frozenset({'avx512_bf16'})\n"
        "from tests.rooms.test_model import request\n"
        "loaded = model.load(request(encoder='auto'))\n"
        "answer = [sorted({'torch', 'faster_whisper', 'tokenizers', 'av', 'onnxruntime'} & before), 'torch' in sys.modules, loaded.encoder]"
    )
    assert answer == [[], False, "ctranslate2"]


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.json"])
def test_a_damaged_model_is_unusable(tmp_path: Path, name: str) -> None:
    """The message names the directory; the process lives."""
    shutil.copytree(DEMO, tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(b"\x06\x00\x00\x00damaged")
    with pytest.raises(ModelUnusable, match="copy"):
        model.load(request(model=str(tmp_path / "copy")))


# --- given back, loaded again --------------------------------------------------------------------------------------------------


def test_fifty_rounds_of_unload_and_reload(loaded: Loaded) -> None:
    """Right after each encoding the model goes and comes back, hears the same, and the process does not grow."""
    core = loaded.whisper.model
    first = np.asarray(core.encode(silence(500)))
    sizes_mib: list[int] = []
    for _ in range(50):
        core.encode(silence(500))
        loaded.unload()
        assert not core.model_is_loaded
        loaded.reload()
        assert core.model_is_loaded
        sizes_mib.append(memory_rss_mib())
    loaded.reload()
    assert np.array_equal(np.asarray(core.encode(silence(500))), first)
    assert max(sizes_mib[5:]) <= sizes_mib[4] + 16


def test_a_model_that_stays_at_work_is_an_error(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    """Unloading does not wait for ever, and does not say that it was done."""
    monkeypatch.setattr(model, "UNLOAD_MAX_S", 0.0)
    busy = SimpleNamespace(model=SimpleNamespace(model_is_loaded=True, unload_model=lambda: None))
    monkeypatch.setattr(loaded, "whisper", busy)
    with pytest.raises(ModelUnusable, match="cannot unload"):
        loaded.unload()


def test_other_files_are_not_loaded_in_its_place(tmp_path: Path) -> None:
    """A transcript's provenance names one model: a directory that was filled anew meanwhile needs a new process."""
    shutil.copytree(DEMO, tmp_path / "copy")
    ours = model.load(request(model=str(tmp_path / "copy")))
    ours.unload()
    with open(tmp_path / "copy" / "model.bin", "ab") as weights:
        weights.write(b"more")
    with pytest.raises(ModelUnusable, match="were replaced"):
        ours.reload()


# --- memory --------------------------------------------------------------------------------------------------------------------

FAULTS = f"""
import resource
import numpy as np
from whisperd.engine import memory
answer = {{"kept": memory.keep_freed_memory() if KEEP else False}}
import ctranslate2
model = ctranslate2.models.Whisper({str(DEMO)!r}, device="cpu", compute_type="int8", intra_threads=1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model.encode(ctranslate2.StorageView.from_array(np.zeros((4, 80, 3000), dtype=np.float32)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
answer["faults"] = sorted(faults() for _ in range(5))[2]
model.unload_model()
answer["held_mib"] = memory.memory_rss_mib()
memory.release_freed_memory()
answer["released_mib"] = memory.memory_rss_mib()
"""

needs_glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")


@needs_glibc
def test_freed_memory_is_used_again() -> None:
    """An encoding that took thousands of page faults takes next to none; the memory goes back when asked."""
    default = fresh(FAULTS.replace("KEEP", "False"))
    kept = fresh(FAULTS.replace("KEEP", "True"))
    assert kept["kept"]
    assert default["faults"] > 1000
    assert kept["faults"] <= 0.01 * default["faults"]
    assert kept["released_mib"] <= kept["held_mib"] - 10


@needs_glibc
@pytest.mark.parametrize("own", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}])
def test_an_operators_allocator_settings_stand(own: dict[str, str]) -> None:
    assert fresh("from whisperd.engine import memory; answer = memory.keep_freed_memory()", **own) is False


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA failed with error out of memory"), True),
        (RuntimeError("cuBLAS failed with status CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes"), True),
        (RuntimeError("mkl_malloc: failed to allocate memory"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("cuBLAS failed with status CUBLAS_STATUS_INTERNAL_ERROR"), False),
        (RuntimeError("Library libcublas.so.12 is not found or cannot be loaded"), False),
        (ValueError("a language out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


# --- CUDA ----------------------------------------------------------------------------------------------------------------------

CUBLAS_BY_NAME = """
import ctypes, sys
from whisperd.engine import cuda
sys.path.append(PLACE)
def by_name():
    try:
        return ctypes.CDLL("libcublas.so.12").cublas_of_the_test()
    except OSError as error:
        return "libcublas.so.12" in str(error)
answer = [by_name()]
try:
    cuda.prepare()
except cuda.CudaUnusable as error:
    answer += [error.what, error.hint]
answer.append(by_name())
"""

needs_no_cublas = pytest.mark.skipif(cuda._loads(cuda.CUBLAS) or cuda._loads("libcublas.so.13"), reason="this machine has cuBLAS itself")


def library(path: Path, source: str, *needed: Path) -> Path:
    """A shared library with its own file name as its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", *needed, "-o", path, f"-Wl,-soname,{path.name}"],
        input=source,
        text=True,
        check=True,
    )
    return path


@needs_gcc
@needs_no_cublas
@pytest.mark.parametrize("place", ["nvidia/cublas/lib", "nvidia/cu12/lib", "torch/lib"])
def test_cublas_of_a_python_package_is_found(tmp_path: Path, place: str) -> None:
    """What CTranslate2 does at its first encoding, loading `libcublas.so.12` by name, works after `prepare` and not before."""
    lt = library(tmp_path / place / "libcublasLt.so.12", "int lt(void) { return 12; }")
    library(tmp_path / place / "libcublas.so.12", "int lt(void); int cublas_of_the_test(void) { return lt(); }", lt)
    assert fresh(CUBLAS_BY_NAME.replace("PLACE", repr(str(tmp_path)))) == [True, 12]


@needs_no_cublas
def test_no_cublas_is_said_before_the_first_job(tmp_path: Path) -> None:
    """With the package to install; nothing was loaded."""
    missing, what, hint, after = fresh(CUBLAS_BY_NAME.replace("PLACE", repr(str(tmp_path))))
    assert missing is after is True
    assert "libcublas.so.12" in what
    assert "not on this machine" in what
    assert "pip install nvidia-cublas-cu12" in hint


@needs_no_cublas
def test_cublas_13_alone_is_said(tmp_path: Path) -> None:
    """CTranslate2 does not work with it (CTranslate2#1933), and the message says that it is what was found."""
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcublas.so.13").touch()
    assert "only cuBLAS 13" in fresh(CUBLAS_BY_NAME.replace("PLACE", repr(str(tmp_path))))[1]


@needs_no_cublas
def test_cublas_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    """The loader's own words are in the message."""
    (tmp_path / "nvidia" / "cublas" / "lib").mkdir(parents=True)
    for name in ("libcublas.so.12", "libcublasLt.so.12"):
        (tmp_path / "nvidia" / "cublas" / "lib" / name).write_text("no library")
    what = fresh(CUBLAS_BY_NAME.replace("PLACE", repr(str(tmp_path))))[1]
    assert "cannot be loaded" in what
    assert "libcublasLt.so.12: " in what


@needs_no_cublas
def test_a_model_for_a_gpu_asks_for_cublas_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is looked for or read."""
    for name in cuda.environment("/cache"):
        monkeypatch.setenv(name, "as it was")
    with pytest.raises(cuda.CudaUnusable):
        model.load(request(model="/nonexistent", device="cuda"))


def test_the_environment_of_cuda() -> None:
    """Kernels compiled once are kept below the cache directory; devices count as NVML counts them."""
    environment = cuda.environment("/var/cache/whisperd")
    assert environment["CUDA_CACHE_PATH"] == "/var/cache/whisperd/cuda"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


DRIVER = """
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#define FIRST 7
#define SECOND 8
static uint64_t free_mib = 5120, reserved_mib = 0, high_mib = 0;
static uintptr_t stack[8]; static int depth = 0, retained = 0, second = 0;
static int of(void *pointer) { return (uintptr_t)pointer; }
static int ours(int device) { return device == 40 + DEVICE; }
int cuInit(unsigned flags) { return FAILURE; }
int cuDeviceGet(int *device, int index) { *device = index + 40; return index > 1 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { retained++; *context = (void *)(uintptr_t)(ours(device) ? FIRST : 9); return 0; }
int cuCtxCreate_v2(void **context, unsigned flags, int device) {
    if (!ours(device) || getenv("ONE_CONTEXT")) return 999;
    free_mib -= 480; second++; stack[depth++] = SECOND; *context = (void *)(uintptr_t)SECOND; return 0; }
int cuCtxDestroy_v2(void *context) {
    if (of(context) != SECOND) return 201;
    free_mib += 480; second--; if (depth && stack[depth - 1] == SECOND) depth--; return 0; }
int cuCtxPushCurrent_v2(void *context) { stack[depth++] = of(context); return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = (void *)stack[--depth]; return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *free = free_mib << 20; *total = 140ull << 30; return depth && stack[depth - 1] == FIRST ? 0 : 201; }
int cuDeviceGetMemPool(void **pool, int device) { *pool = (void *)(uintptr_t)(ours(device) ? 3 : 0); return 0; }
int cuMemPoolGetAttribute(void *pool, int name, uint64_t *value) {
    *value = (name == 5 ? reserved_mib : high_mib) << 20; return of(pool) == 3 && (name == 5 || name == 6) ? 0 : 1; }
int cuMemPoolSetAttribute(void *pool, int name, uint64_t *value) { if (*value || name != 6) return 1; high_mib = reserved_mib; return 0; }
int balanced(void) { return depth == 0 && retained == 1 && second == 0; }
void pool_holds(int mib) {
    free_mib += reserved_mib - mib; reserved_mib = mib; if (reserved_mib > high_mib) high_mib = reserved_mib; }
void others_take(int mib) { free_mib -= mib; }
"""


def driver(tmp_path: Path, *, failure: int = 0, device: int = 0) -> dict[str, str]:
    """A libcuda.so.1 with figures that the test sets, for the environment of a process."""
    source = DRIVER.replace("FAILURE", str(failure)).replace("DEVICE", str(device))
    library(tmp_path / "libcuda.so.1", source)
    return {"LD_LIBRARY_PATH": str(tmp_path)}


FIGURES = """
import ctypes
from whisperd.engine import cuda
PREPARE
answer = [cuda.memory_mib(1), cuda.pool_mib(1), cuda.pool_peak_mib(1), cuda.pool_peak_mib(1), cuda.context_mib(1), cuda.memory_mib(1)]
answer += [cuda.memory_mib(2), cuda.pool_mib(2), cuda.pool_peak_mib(2), cuda.context_mib(2)]
"""


@needs_gcc
def test_memory_figures_of_the_driver(tmp_path: Path) -> None:
    """Free and total of the right GPU in MiB, its context current only meanwhile and held once; the peak counts anew after each look;
    what a context takes is seen by a second one, which is gone at once."""
    prepare = "driver = ctypes.CDLL('libcuda.so.1'); driver.pool_holds(700); driver.pool_holds(300)"
    code = FIGURES.replace("PREPARE", prepare) + "answer.append(driver.balanced())"
    answer = fresh(code, **driver(tmp_path, device=1))
    assert answer == [[4820, 143360], 300, 700, 300, 480, [4820, 143360], None, None, None, None, 1]


HELD = """
import ctypes
from whisperd.engine import vram
driver = ctypes.CDLL('libcuda.so.1')
before = vram.look()
driver.pool_holds(1600)
driver.others_take(100)
held = vram.settle(before)
answer = [held.outside_mib, held.loaded_mib, vram.used_mib()]
driver.pool_holds(2600)
driver.pool_holds(1800)
answer += [vram.peak_mib(held), vram.peak_mib(held), vram.told(held), vram.told(None), driver.balanced()]
"""


@needs_gcc
def test_what_this_process_holds_of_its_gpu(tmp_path: Path) -> None:
    """Context, cuBLAS and pool after loading, then with each look the most of the pool since the one before; everybody's beside it."""
    assert fresh(HELD, **driver(tmp_path)) == [
        480 + 100,
        480 + 100 + 1600,
        143360 - 5120 + 1600 + 100,
        580 + 2600,
        580 + 1800,
        "3220 of 143360 MiB of the GPU are free, this process holds 2380 MiB",
        "3220 of 143360 MiB of the GPU are free",
        1,
    ]


@needs_gcc
def test_a_context_that_cannot_be_measured_has_the_usual_size(tmp_path: Path) -> None:
    """Where a process may have only one (exclusive mode)."""
    assert fresh(HELD, **driver(tmp_path), ONE_CONTEXT="1")[0] == vram.CONTEXT_USUAL_MIB + 100


@pytest.mark.parametrize(
    ("context_mib", "grown_mib", "pool_mib", "outside_mib"),
    [
        (480, 1700, 1600, 580),
        (480, 1500, 1600, 480),  # somebody else gave memory back meanwhile
        (480, 9000, 1600, 480 + vram.WORKSPACE_MAX_MIB),  # somebody else took some
        (-300, 1700, 1600, vram.CONTEXT_USUAL_MIB + 100),
        (9000, 1700, 1600, vram.CONTEXT_USUAL_MIB + 100),
        (None, 1700, 1600, vram.CONTEXT_USUAL_MIB + 100),
        (480, 1700, 0, 480 + 1700),  # another allocator than the pool
    ],
)
def test_what_of_a_gpu_is_ours(context_mib: int | None, grown_mib: int, pool_mib: int, outside_mib: int) -> None:
    """The whole GPU's change is ours only as far as it can be; without a pool there is no peak to be told."""
    held = vram.holding(context_mib, grown_mib, pool_mib)
    assert held == vram.Holding(outside_mib, outside_mib + pool_mib)
    assert held.pooled is (pool_mib > 0)


NO_FIGURES = FIGURES.replace("PREPARE", "") + "from whisperd.engine import vram; answer += [vram.look(), vram.used_mib(), vram.told(None)]"
UNTOLD = [None] * 12 + ["the GPU's driver does not say how much was free"]


@needs_gcc
def test_a_driver_that_does_not_start_has_no_figures(tmp_path: Path) -> None:
    assert fresh(NO_FIGURES, **driver(tmp_path, failure=100)) == UNTOLD


@pytest.mark.skipif(cuda._loads(cuda.DRIVER), reason="this machine has a driver")
def test_no_driver_no_figures() -> None:
    assert fresh(NO_FIGURES) == UNTOLD
