"""cuda: what must stand before CTranslate2 is asked for a GPU, and how much of a GPU's memory is in use.

Owns: finding cuBLAS 12, the environment of CUDA, memory figures by the driver's own library. CTranslate2 loads `libcublas.so.12` by
its name, at the first encoding: a machine without it would load the model and then fail every job. Fails with `CudaUnusable`.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import sys
from typing import NamedTuple

from whisperd.errors import WhisperdError

CUBLAS = "libcublas.so.12"
CUBLAS_LT = "libcublasLt.so.12"  # needed by the other one
DRIVER = "libcuda.so.1"
CACHE_MAX_BYTES = 1 << 30

DEVICE_INDEX = 0  # of the only GPU that an engine sees

_POOL_RESERVED, _POOL_RESERVED_HIGH = 5, 6  # CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT and _HIGH in cuda.h


class CudaUnusable(WhisperdError):
    """There is a GPU to be used, but what CTranslate2 needs for it is not on this machine."""

    code = "cuda_unusable"
    recoverable = True


class MemoryMib(NamedTuple):
    """A GPU's memory as its driver counts it, all processes together."""

    free: int
    total: int


def environment(cache_dir: str) -> dict[str, str]:
    """Variables for a process that uses a GPU; they must be set before its first CUDA call.

    CTranslate2's wheel has no code of its own for the newest GPUs: the driver compiles it at first use, into the cache named here,
    which a service has no home directory for.
    """
    return {
        "CUDA_CACHE_PATH": os.path.join(cache_dir, "cuda"),
        "CUDA_CACHE_MAXSIZE": str(CACHE_MAX_BYTES),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML, which the daemon counts by
        "CUDA_MODULE_LOADING": "LAZY",
    }


def prepare() -> None:
    """See that `libcublas.so.12` will be found by name: by the system's loader, else from Python packages. Raises CudaUnusable."""
    if _loads(CUBLAS):
        return
    refused: list[str] = []
    for directory in _package_directories():
        if not os.path.isfile(os.path.join(directory, CUBLAS)):
            continue
        try:
            for name in (CUBLAS_LT, CUBLAS):  # loaded once, they answer to their own name
                ctypes.CDLL(os.path.join(directory, name), mode=ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            refused.append(str(error))
    raise _no_cublas(refused)


def _no_cublas(refused: list[str]) -> CudaUnusable:
    why = f"it is there but cannot be loaded ({'; '.join(refused)})" if refused else "it is not on this machine"
    if not refused and _has_cublas_13():
        why = "only cuBLAS 13 is on this machine, with which CTranslate2 does not work"
    return CudaUnusable(
        f"cannot use the GPU: CTranslate2 needs cuBLAS 12 ({CUBLAS}), and {why}",
        hint="install it beside whisperd (pip install nvidia-cublas-cu12, in the same environment), or the CUDA 12 runtime for the "
        'whole system; or set engine.device = "cpu"',
    )


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _package_directories() -> list[str]:
    """Where wheels put CUDA's libraries: nvidia/cublas/lib, nvidia/cu12/lib, …, and PyTorch's own directory."""
    patterns = (("nvidia", "*", "lib"), ("torch", "lib"))
    return [
        directory
        for place in sys.path
        for pattern in patterns
        for directory in sorted(glob.glob(os.path.join(glob.escape(place or "."), *pattern)))
    ]


def _has_cublas_13() -> bool:
    return _loads("libcublas.so.13") or any(os.path.isfile(os.path.join(found, "libcublas.so.13")) for found in _package_directories())


def memory_mib(device_index: int) -> MemoryMib | None:
    """The memory of a visible GPU; None where the driver does not say. Joins the context that CTranslate2 uses, makes no other."""
    driver = _driver_on(device_index)
    if driver is None:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.library.cuCtxPushCurrent_v2(driver.context) != 0:
        return None
    failed = driver.library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    return None if failed else MemoryMib(free.value >> 20, total.value >> 20)


def context_mib(device_index: int) -> int | None:
    """What one context takes of a GPU's memory; None where the driver does not say.

    Free memory cannot be asked for without a context, so what ours took does not show: for a moment a second one is opened beside it.
    """
    driver, before = _driver_on(device_index), memory_mib(device_index)
    if driver is None or before is None:
        return None
    second = ctypes.c_void_p()
    if driver.library.cuCtxCreate_v2(ctypes.byref(second), 0, driver.device) != 0:
        return None
    beside = memory_mib(device_index)
    driver.library.cuCtxDestroy_v2(second)
    return None if beside is None else before.free - beside.free


def pool_mib(device_index: int) -> int | None:
    """What CTranslate2's allocator holds on a GPU; None where the driver does not say.

    The model is in it, the context (some hundred MiB) and cuBLAS's own work space are not. With CT2_CUDA_ALLOCATOR=cub_caching
    the pool is not used, and this is 0.
    """
    return _pool_figure(device_index, _POOL_RESERVED, reset=False)


def pool_peak_mib(device_index: int) -> int | None:
    """The most that it held since the last call; None where the driver does not say."""
    return _pool_figure(device_index, _POOL_RESERVED_HIGH, reset=True)


def _pool_figure(device_index: int, attribute: int, *, reset: bool) -> int | None:
    driver = _driver_on(device_index)
    if driver is None:
        return None
    pool, figure = ctypes.c_void_p(), ctypes.c_uint64()
    if driver.library.cuDeviceGetMemPool(ctypes.byref(pool), driver.device) != 0:
        return None
    if driver.library.cuMemPoolGetAttribute(pool, attribute, ctypes.byref(figure)) != 0:
        return None
    if reset:  # a high-water mark that is set to 0 starts again from what is held now
        driver.library.cuMemPoolSetAttribute(pool, attribute, ctypes.byref(ctypes.c_uint64(0)))
    return figure.value >> 20


class _Driver(NamedTuple):
    """The driver's library with a GPU and its primary context, held as long as the process lives."""

    library: ctypes.CDLL
    device: ctypes.c_int
    context: ctypes.c_void_p


@functools.cache
def _driver_on(device_index: int) -> _Driver | None:
    try:
        library = ctypes.CDLL(DRIVER)
    except OSError:  # no driver, no GPU
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), device_index):
        return None
    if library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    return _Driver(library, device, context)
