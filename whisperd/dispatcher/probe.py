"""probe process: the only importer of NVML, which can hang in the kernel or crash (OPTIMISER.md §2).

The wire is standard input. It sends `Readings` every `interval_s`: one for each GPU, or one that says plainly why there is none.
"""

from __future__ import annotations

import sys
from typing import Any

from whisperd.log import to_parent
from whisperd.vocabulary import Reading
from whisperd.wire import Channel, ProbeIn, Readings, StartProbe, WireClosed, join_daemon


def read_all() -> tuple[Reading, ...]:
    """One look at every GPU. Every failure is a reading, never an exception."""
    try:
        import pynvml
    except ImportError as error:
        return (_none("no_driver", f"no GPU: the NVML bindings cannot be imported ({error})"),)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (_without_nvml(pynvml, error),)
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        count = int(pynvml.nvmlDeviceGetCount())
        if count == 0:
            return (_none("no_gpu", f"no GPU: the driver {driver} knows none"),)
        return tuple(_one(pynvml, number, driver) for number in range(count))
    except pynvml.NVMLError as error:
        return (_none("unknown", f"the GPU driver does not answer: {error}"),)
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:  # nothing was open any more
            pass


def _without_nvml(pynvml: Any, error: Any) -> Reading:
    match error.value:
        case pynvml.NVML_ERROR_LIBRARY_NOT_FOUND | pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
            return _none("no_driver", "no GPU: no NVIDIA driver on this machine")
        case pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return _none("mismatch", "the GPU driver was updated but not reloaded: reboot the machine or reload the kernel module")
        case pynvml.NVML_ERROR_NO_PERMISSION:
            return _none("unknown", "the GPU may not be read by this user: check the unit's DeviceAllow and the group of /dev/nvidia*")
        case _:
            return _none("unknown", f"the GPU driver does not answer: {error}")


def _one(pynvml: Any, number: int, driver: str) -> Reading:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError as error:
        return Reading(gpu=f"#{number}", status="lost", what=f"GPU {number} cannot be reached: {error}", driver=driver)

    def ask(function: Any, *args: Any) -> Any:
        """The answer, or None: not supported is unknown, and unknown is never zero."""
        try:
            return function(handle, *args)
        except pynvml.NVMLError:
            return None

    name = _text(ask(pynvml.nvmlDeviceGetName) or "GPU")
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    rates = ask(pynvml.nvmlDeviceGetUtilizationRates)
    return Reading(
        gpu=uuid,
        status="ok",
        what=f"{name} (driver {driver})",
        name=name,
        driver=driver,
        vram_total_mib=memory.total >> 20 if memory else None,
        vram_used_mib=memory.used >> 20 if memory else None,
        utilisation_percent=min(100, max(0, int(rates.gpu))) if rates else None,
        temperature_c=ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
    )


def _none(status: str, what: str) -> Reading:
    return Reading(gpu="", status=status, what=what)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def main() -> int:
    to_parent()
    channel: Channel[ProbeIn] = join_daemon(ProbeIn)
    interval_s: float | None = None
    try:
        while True:
            for frame in channel.wait(interval_s):
                if not isinstance(frame.message, StartProbe):
                    return 0
                interval_s = frame.message.interval_s
            if interval_s is not None:
                channel.send_all(Readings(readings=read_all()))
    except WireClosed:
        return 0


if __name__ == "__main__":
    sys.exit(main())
