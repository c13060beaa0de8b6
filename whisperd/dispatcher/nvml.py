"""nvml: NVIDIA's management library, open, in this process: its GPUs, their figures, their error events (OPTIMISER.md §2).

Owns: what each of its errors means, the map of what each GPU can tell, and the thread that waits for XIDs. The bindings are handed in: the
probe process alone imports them. Fails with the bindings' own NVMLError, and with `Stuck` when only a new process can go on.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from whisperd.dispatcher import xid
from whisperd.vocabulary import GpuProcess, Reading

T = TypeVar("T")

EVENT_WAIT_MS = 250
EVENT_PAUSE_S = 1.0  # where waiting itself fails
CLOSE_S = 2.0

NOT_INITIALISED, BAD_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 1, 2, 3, 4
TIMEOUT, FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND = 10, 13, 15, 16, 28
NOT_GIVEN = {BAD_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND}  # asked again, the answer would be the same
GONE = {NOT_INITIALISED, GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND}  # no use to ask this GPU anything more

THROTTLED = ((0x20 | 0x40, "thermal"), (0x08, "hw_slowdown"), (0x80, "power_brake"), (0x04, "power_cap"))
RECOVERY_ACTION = 230  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
RECOVERY_BY_RESET = (1, 2, 4, 6, 7)  # reset, reboot, drain and reset, bus reset, system reboot

NO_DRIVER = ("no_driver", "no GPU: no NVIDIA driver on this machine")
LOST = ("lost", f"it cannot be reached any more: {xid.SEATING}")
REVOKED = (
    "revoked",
    "this container has lost its right to the GPU's devices (a `systemctl daemon-reload` on the host does that): recreate the container,"
    " with --device for each of /dev/nvidiactl, /dev/nvidia-uvm and /dev/nvidia<n>, or by CDI, so that it cannot happen again",
)
TROUBLE = {
    NO_PERMISSION: ("unknown", "the GPU may not be read by this user: check the unit's DeviceAllow and the group of /dev/nvidia*"),
    9: NO_DRIVER,  # DRIVER_NOT_LOADED
    12: NO_DRIVER,  # LIBRARY_NOT_FOUND
    GPU_IS_LOST: LOST,
    RESET_REQUIRED: ("reset_required", f"it needs a reset: {xid.RESET}"),
    18: ("mismatch", "the GPU driver was updated but not reloaded: reboot the machine or reload the kernel module"),
    GPU_NOT_FOUND: LOST,
}
UNKNOWN = 999


class Stuck(Exception):
    """NVML cannot be closed: only a new process can open it anew."""


def trouble(code: int, said: str, *, in_container: bool) -> tuple[str, str]:
    """Status and sentence for an error that leaves nothing to measure (OPTIMISER.md §2, table)."""
    if code == UNKNOWN and in_container:
        return REVOKED
    return TROUBLE.get(code, ("unknown", f"the GPU driver does not answer: {said}"))


class Card:
    """One GPU of an open NVML."""

    def __init__(self, nvml: Any, handle: Any, driver: str) -> None:
        self._nvml = nvml
        self.handle = handle
        self.uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        self.driver = driver
        self._unsupported: set[str] = set()
        self.name = self._figure("name", lambda: _text(self._ask("nvmlDeviceGetName"))) or "GPU"
        self.pci = self._quiet(lambda: xid.pci_address(_text(self._ask("nvmlDeviceGetPciInfo").busId)))

    def read(self, mps: bool | None) -> Reading:
        """All its figures. Raises NVMLError when the GPU does not answer at all."""
        self._unsupported.clear()
        total_mib, used_mib = self._memory()
        clients = self._quiet(lambda: list(self._ask("nvmlDeviceGetMPSComputeRunningProcesses"))) or []
        reading = Reading(
            gpu=self.uuid,
            status="ok",
            what=f"{self.name} (driver {self.driver})",
            name=self.name,
            driver=self.driver,
            vram_total_mib=total_mib,
            vram_used_mib=used_mib,
            utilisation_percent=self._figure("utilisation_percent", lambda: _percent(self._ask("nvmlDeviceGetUtilizationRates").gpu)),
            temperature_c=(heat := self._figure("temperature_c", lambda: int(self._ask("nvmlDeviceGetTemperature", 0)))),
            slowdown_c=self._slowdown_c(heat),
            power_w=self._figure("power_w", lambda: round(self._ask("nvmlDeviceGetPowerUsage") / 1000)),
            power_limit_w=self._figure(
                "power_limit_w",
                lambda: round(self._ask("nvmlDeviceGetEnforcedPowerLimit") / 1000),
                lambda: round(self._ask("nvmlDeviceGetPowerManagementLimit") / 1000),
            ),
            throttled=self._throttled(),
            mig=self._mig(),
            mps=True if clients else mps,
            processes=self._processes(clients),
        )
        return msgspec.structs.replace(reading, unsupported=tuple(sorted(self._unsupported)), **self._needs_reset())

    def _ask(self, name: str, *args: Any, **options: Any) -> Any:
        """Raises NVMLError, also where these bindings are too old to know the function."""
        function = getattr(self._nvml, name, None)
        if function is None:
            raise self._nvml.NVMLError(FUNCTION_NOT_FOUND)
        return function(self.handle, *args, **options)

    def _figure(self, figure: str, *ways: Callable[[], T]) -> T | None:
        """What the first way that works tells, or None: then it is unknown, which is never zero, and named if it will stay so."""
        answers = set()
        for way in ways:
            try:
                return way()
            except self._nvml.NVMLError as error:
                if error.value in GONE:
                    raise
                answers.add(error.value)
        if answers <= set(NOT_GIVEN):
            self._unsupported.add(figure)
        return None

    def _quiet(self, way: Callable[[], T]) -> T | None:
        """A figure of our own: many GPUs do not have it, and nobody is told."""
        known = set(self._unsupported)
        found = self._figure("", way)
        self._unsupported = known
        return found

    def _memory(self) -> tuple[int | None, int | None]:
        """Total and used MiB. What is not free is used: that holds in both versions, which differ in where they put the reserved."""
        try:
            try:
                found = self._ask("nvmlDeviceGetMemoryInfo", version=self._nvml.nvmlMemory_v2)
            except self._nvml.NVMLError:  # old drivers do not know version 2, and some of WSL's fail in it
                found = self._ask("nvmlDeviceGetMemoryInfo")
        except self._nvml.NVMLError as error:
            if error.value not in NOT_GIVEN:
                raise
            self._unsupported.update(("vram_total_mib", "vram_used_mib"))
            return None, None
        total_mib = int(found.total) >> 20
        return total_mib, total_mib - (int(found.free) >> 20)

    def _slowdown_c(self, heat: int | None) -> int | None:
        def by_margin() -> int:
            margin_c = int(self._ask("nvmlDeviceGetMarginTemperature"))  # newer boards tell only how far away it is
            if heat is None:
                raise self._nvml.NVMLError(NOT_SUPPORTED)
            return heat + margin_c

        return self._figure("slowdown_c", lambda: int(self._ask("nvmlDeviceGetTemperatureThreshold", 1)), by_margin)

    def _throttled(self) -> tuple[str, ...]:
        bits = self._figure(
            "throttled",
            lambda: int(self._ask("nvmlDeviceGetCurrentClocksEventReasons")),
            lambda: int(self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")),  # the name before driver 535
        )
        return tuple(name for mask, name in THROTTLED if (bits or 0) & mask)

    def _mig(self) -> bool | None:
        def mode() -> bool:
            try:
                return bool(self._ask("nvmlDeviceGetMigMode")[0])
            except self._nvml.NVMLError as error:
                if error.value in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):  # this GPU cannot be divided
                    return False
                raise

        return self._quiet(mode)

    def _processes(self, clients: list[Any]) -> tuple[GpuProcess, ...] | None:
        """`clients` are those of MPS, which are listed apart."""
        listed = self._figure("processes", lambda: list(self._ask("nvmlDeviceGetComputeRunningProcesses")))
        if listed is None:
            return None
        listed += clients
        found = {int(one.pid): None if one.usedGpuMemory is None else int(one.usedGpuMemory) >> 20 for one in listed}
        return tuple(GpuProcess(pid=pid, vram_mib=mib) for pid, mib in sorted(found.items()))

    def _needs_reset(self) -> dict[str, str]:
        """Status and sentence, when the board's own state asks for a reset."""
        rows = self._quiet(lambda: self._ask("nvmlDeviceGetRemappedRows"))
        why = "a row of its memory could not be remapped" if rows and rows[3] else ""
        action = self._quiet(lambda: self._ask("nvmlDeviceGetFieldValues", [RECOVERY_ACTION])[0])
        if action is not None and action.nvmlReturn == 0 and action.value.uiVal in RECOVERY_BY_RESET:
            why = why or "it asks for one"
        return {"status": "reset_required", "what": f"{self.name} needs a reset, {why}: {xid.RESET}"} if why else {}


class Events:
    """A thread that waits for XIDs, since the wait holds it up; it may hang without holding up the looks."""

    def __init__(self, nvml: Any, cards: Iterable[Card]) -> None:
        self._nvml = nvml
        self._stop = threading.Event()
        self._codes: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        self._of_handle: dict[int | None, str] = {}
        self._set: Any = None
        self._thread: threading.Thread | None = None
        try:
            self._set = nvml.nvmlEventSetCreate()
        except nvml.NVMLError:
            return
        for card in cards:
            try:
                nvml.nvmlDeviceRegisterEvents(card.handle, nvml.nvmlEventTypeXidCriticalError, self._set)
                self._of_handle[_address(card.handle)] = card.uuid
            except nvml.NVMLError:  # this GPU tells no events: `take` says so
                pass
        if self._of_handle:
            self._thread = threading.Thread(target=self._listen, name="xid", daemon=True)
            self._thread.start()

    def take(self, uuid: str) -> list[int] | None:
        """The codes since the last time; None for a GPU that tells no events."""
        if uuid not in self._of_handle.values():
            return None
        with self._lock:
            return self._codes.pop(uuid, [])

    def close(self) -> None:
        """Raises Stuck when the thread hangs in the driver."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                raise Stuck("the thread that waits for XIDs hangs in the driver")
        if self._set is not None:
            _give_back(self._nvml, self._nvml.nvmlEventSetFree, self._set)

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._set, EVENT_WAIT_MS)
            except self._nvml.NVMLError as error:
                if error.value != TIMEOUT:  # a lost GPU fails the wait at once, again and again
                    self._stop.wait(EVENT_PAUSE_S)
                continue
            uuid = self._of_handle.get(_address(event.device))
            if uuid is not None and event.eventType == self._nvml.nvmlEventTypeXidCriticalError:
                with self._lock:
                    self._codes.setdefault(uuid, []).append(int(event.eventData))


class Session:
    """NVML, open: its GPUs, its events, and the library file that was loaded. Raises NVMLError when it cannot be opened."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        try:
            self.driver = _text(nvml.nvmlSystemGetDriverVersion())
            self.count = int(nvml.nvmlDeviceGetCount())
            self.cards: dict[str, Card] = {}
            self.unreachable: list[Any] = []  # errors
            for number in range(self.count):
                try:
                    card = Card(nvml, nvml.nvmlDeviceGetHandleByIndex(number), self.driver)
                    self.cards[card.uuid] = card
                except nvml.NVMLError as error:
                    self.unreachable.append(error)
            self.events = Events(nvml, self.cards.values())
        except nvml.NVMLError:
            _give_back(nvml, nvml.nvmlShutdown)
            raise
        self._library = _mapped_library()

    def check(self) -> bool:
        """Whether this is still the set of GPUs that was opened. Raises NVMLError when NVML as a whole does not answer."""
        return int(self._nvml.nvmlDeviceGetCount()) == self.count

    def replaced(self) -> bool:
        """Whether another file took the place of the library that is loaded."""
        return self._library is not None and _identity(self._library[0]) != self._library[1]

    def close(self) -> None:
        """Raises Stuck."""
        self.events.close()
        _give_back(self._nvml, self._nvml.nvmlShutdown)


def _give_back(nvml: Any, function: Callable[..., None], *args: Any) -> None:
    """What is broken cannot even be given back, and nothing is lost by that."""
    try:
        function(*args)
    except nvml.NVMLError:
        pass


def _mapped_library() -> tuple[str, tuple[int, int] | None] | None:
    """The file of the NVML library in this process, with its identity."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            path = next((line.split(maxsplit=5)[5].strip() for line in maps if "libnvidia-ml.so" in line), None)
    except OSError:
        return None
    return None if path is None else (path, _identity(path))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:  # it was removed
        return None
    return found.st_dev, found.st_ino


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _percent(value: float) -> int:
    return min(100, max(0, int(value)))


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
