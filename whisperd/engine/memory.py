"""memory: what this process takes of the machine's memory, and how its allocator keeps it.

Owns: the allocator's settings, the resident size, telling "no memory left" from other errors. Never fails: where the C library is not
glibc, nothing is set.
"""

from __future__ import annotations

import ctypes
import os

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT_FREE_BYTES = (1 << 31) - 1
_MAPPED_FROM_BYTES = 1 << 30

_NO_MEMORY = ("out of memory", "alloc_failed", "bad_alloc", "allocate memory", "could not create a memory object")  # the last is oneDNN's


def keep_freed_memory() -> bool:
    """Let the allocator use freed memory again instead of handing it to the kernel after every layer; whether that was set.

    Otherwise a quarter to a third of the encoder's time goes into page faults. The peak stays about what it was, but is held until
    `release_freed_memory`. All in one arena: others cannot hold blocks of more than 64 MiB. To be called before threads start. An
    operator's own settings in the environment stand.
    """
    if _c_library() is None or "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _MAPPED_FROM_BYTES), (_TRIM_THRESHOLD, _KEPT_FREE_BYTES))
    return all(_glibc().mallopt(setting, value) == 1 for setting, value in settings)


def release_freed_memory() -> None:
    """Give to the kernel what is free but held."""
    if _c_library() is not None:
        _glibc().malloc_trim(0)


def _c_library() -> str | None:
    """Name and version of the C library if it is glibc, else None."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return None


def _glibc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def memory_rss_mib() -> int:
    """Resident size of this process."""
    with open("/proc/self/statm", encoding="ascii") as sizes:
        return int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that no memory was left: the machine's (MemoryError, std::bad_alloc) or the GPU's (CUDA, cuBLAS)."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in said for sign in _NO_MEMORY))
