"""Where the use of GPUs is read: pages of DCGM exporters, or NVML where extproc runs beside the GPUs.

Names of DCGM: NVIDIA/dcgm-exporter `etc/default-counters.csv`; labels `gpu`, `UUID`, `Hostname`, and with Kubernetes `pod` (`README.md`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import aiohttp

from extproc.adapters.pages import USER_AGENT

MAX_BYTES: Final = 2 << 20
"""Of a page, which is read on the event loop; 8 GPUs have 100 KB, cut into 7 parts each 800 KB."""


class GpuError(Exception):
    """Nothing is known of the GPUs; the text says why, and the remedy."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one part of it (MIG)."""

    index: int | None = None
    """On its host."""
    uuid: str | None = None
    pod: str | None = None
    """Name of the pod that has it; None where nobody tells."""
    use: float | None = None
    """Share of the last sample period with a kernel running, 0 to 1."""
    memory: float | None = None
    """Share of its memory that is taken, 0 to 1."""


class GpuSource(Protocol):
    """Where it is read."""

    def place(self, host: str) -> str:
        """The one reading that tells of the GPUs of a host (an IP address). Hosts with the same place are told of together."""

    async def read(self, place: str) -> Sequence[Gpu]:
        """The GPUs there. Raises GpuError."""

    async def close(self) -> None:
        """Let go of everything."""


# --- DCGM -------------------------------------------------------------------------------------------------------------

_LINE: Final = re.compile(r"\nDCGM_FI_(DEV_GPU_UTIL|PROF_GR_ENGINE_ACTIVE|DEV_FB_USED|DEV_FB_FREE)\{(.*)\} +(\S+)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_dcgm(page: str) -> tuple[Gpu, ...]:
    """The GPUs of a DCGM exporter's page, in its order. Never raises; what is absent or absurd is None."""
    found: dict[tuple[str | None, ...], dict[str, Any]] = {}
    for name, text, value in _LINE.findall("\n" + page):
        labels = dict(_LABEL.findall(text))
        key = (labels.get("Hostname"), labels.get("UUID"), labels.get("gpu"), labels.get("GPU_I_ID"))
        figures = found.setdefault(key, {"labels": {}})
        figures["labels"] |= labels
        figures[name] = _number(value)
    return tuple(_gpu(figures) for figures in found.values())


def _gpu(figures: dict[str, Any]) -> Gpu:
    labels, percent = figures["labels"], figures.get("DEV_GPU_UTIL")
    # Parts of a GPU (MIG) have no utilization, but the share of time in which their engine was active.
    use = figures.get("PROF_GR_ENGINE_ACTIVE") if percent is None else percent / 100.0
    index = labels.get("gpu", "")
    return Gpu(
        index=int(index) if index.isdecimal() and len(index) < 6 else None,
        uuid=labels.get("UUID") or None,
        pod=labels.get("pod") or labels.get("exported_pod") or None,
        use=use if use is not None and use <= 1.0 else None,
        memory=_taken(figures.get("DEV_FB_USED"), figures.get("DEV_FB_FREE")),
    )


def _taken(used: float | None, free: float | None) -> float | None:
    return None if used is None or free is None or not used + free else used / (used + free)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 <= value < 1e15 else None  # DCGM says "no value" by numbers near 2**63


class DcgmPages:
    """Pages of DCGM exporters over HTTP. Opens at the first `read`, which needs a running loop."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`{host}` in `url` is the IP address of a replica: one exporter a node."""
        self._url = url
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    def place(self, host: str) -> str:
        return self._url.replace("{host}", host)

    async def read(self, place: str) -> Sequence[Gpu]:
        try:
            page = await self._fetch(place)
        except (aiohttp.ClientError, TimeoutError, ValueError) as e:
            raise GpuError(f"{place}: {str(e) or type(e).__name__}") from None
        gpus = read_dcgm(page)
        if not gpus:
            raise GpuError(f"{place}: has no DCGM_FI_DEV_GPU_UTIL; is it a DCGM exporter's page?")
        return gpus

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _fetch(self, url: str) -> str:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._timeout_s)
            self._session = aiohttp.ClientSession(timeout=timeout, headers={"user-agent": USER_AGENT})
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise GpuError(f"{url}: status {response.status}")
            page = bytearray()
            async for part in response.content.iter_any():
                page += part
                if len(page) > MAX_BYTES:
                    raise GpuError(f"{url}: larger than {MAX_BYTES} bytes")
            return page.decode(errors="replace")


# --- NVML -------------------------------------------------------------------------------------------------------------


class Nvml(Protocol):
    """NVIDIA's management library, as far as it is needed. Blocks; called in a thread."""

    def gpus(self) -> Sequence[Gpu]:
        """The GPUs of this machine. Raises GpuError."""

    def close(self) -> None:
        """Let go of the library."""


def _pynvml() -> Any:
    import pynvml  # type: ignore[import-untyped]

    return pynvml


class NvmlLibrary:
    """The real one, loaded at the first question, and again after each that failed."""

    def __init__(self, load: Callable[[], Any] = _pynvml) -> None:
        """`load` imports the binding."""
        self._load = load
        self._pynvml: Any = None

    def gpus(self) -> Sequence[Gpu]:
        nvml = self._loaded()
        try:
            return [self._gpu(nvml, i) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as e:
            self.close()
            raise GpuError(f"NVML: {e}") from None

    def close(self) -> None:
        nvml, self._pynvml = self._pynvml, None
        if nvml is not None:
            with suppress(nvml.NVMLError):  # it is gone already, and with it what there was to let go of
                nvml.nvmlShutdown()

    def _loaded(self) -> Any:
        if self._pynvml is None:
            try:
                nvml = self._load()
            except ImportError:
                raise GpuError("gpu.nvml needs NVML's binding; pip install 'extproc[nvml]'") from None
            try:
                nvml.nvmlInit()
            except nvml.NVMLError as e:
                raise GpuError(f"NVML: {e}; gpu.nvml needs NVIDIA's driver on this machine, or use gpu.url") from None
            self._pynvml = nvml
        return self._pynvml

    def _gpu(self, nvml: Any, index: int) -> Gpu:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        use = _asked(nvml, lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100.0)
        memory = _asked(nvml, lambda: _share(nvml.nvmlDeviceGetMemoryInfo(handle)))
        return Gpu(index, uuid.decode() if isinstance(uuid, bytes) else uuid, None, use, memory)


def _share(memory: Any) -> float | None:
    return _taken(float(memory.used), float(memory.total) - float(memory.used))


def _asked(nvml: Any, question: Callable[[], float | None]) -> float | None:
    """None for what this GPU does not tell: one that is cut in parts (MIG) has no utilization."""
    try:
        return question()
    except nvml.NVMLError:
        return None


class LocalGpus:
    """The GPUs of this machine, whatever host is asked for."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml

    def place(self, host: str) -> str:  # noqa: ARG002 - a Protocol's
        return "this machine"

    async def read(self, place: str) -> Sequence[Gpu]:  # noqa: ARG002 - a Protocol's
        return await asyncio.to_thread(self._nvml.gpus)

    async def close(self) -> None:
        await asyncio.to_thread(self._nvml.close)


class FakeGpus:
    """GPUs set by hand, by place; a place without any is an error."""

    def __init__(self, gpus: dict[str, Iterable[Gpu]]) -> None:
        """By host (an IP address)."""
        self.gpus_at = gpus
        self.closed = False

    def place(self, host: str) -> str:
        return host

    async def read(self, place: str) -> Sequence[Gpu]:
        await asyncio.sleep(0)
        if place not in self.gpus_at:
            raise GpuError(f"{place}: nothing there")
        return tuple(self.gpus_at[place])

    async def close(self) -> None:
        self.closed = True
