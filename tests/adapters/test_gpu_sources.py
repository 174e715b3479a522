"""DCGM's page, and NVML with and without its library, driver and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.gpu_sources import DcgmPages, Gpu, GpuError, LocalGpus, NvmlLibrary, read_dcgm
from tests.adapters.engines.pages import documented
from tests.support.ports import free_port


class TestDcgmPage:
    def test_each_gpu_with_its_use_and_memory(self) -> None:
        assert read_dcgm(documented("dcgm_4.txt").decode()) == (
            Gpu(0, "GPU-aaaa", None, 0.9, 0.75),
            Gpu(1, "GPU-bbbb", None, 0.3, 0.25),
            Gpu(2, "GPU-cccc", "vllm-0", 0.1, 0.5),
        )

    def test_parts_of_a_gpu_have_the_share_of_time_instead(self) -> None:
        page = """DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-a",GPU_I_PROFILE="3g.40gb",GPU_I_ID="1"} 0.5
DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-a",GPU_I_PROFILE="3g.40gb",GPU_I_ID="2"} 0.25
"""
        assert [gpu.use for gpu in read_dcgm(page)] == [0.5, 0.25]

    @pytest.mark.parametrize("value", ["NaN", "-1", "101", "9223372036854775794", "x"])
    def test_what_is_no_share_is_unknown(self, value: str) -> None:
        assert read_dcgm(f'DCGM_FI_DEV_GPU_UTIL{{gpu="0"}} {value}\n')[0].use is None

    def test_a_card_without_memory_figures_has_none(self) -> None:
        assert read_dcgm('DCGM_FI_DEV_GPU_UTIL{gpu="0"} 5\nDCGM_FI_DEV_FB_USED{gpu="0"} 5\n') == (
            Gpu(0, None, None, 0.05, None),
        )

    @given(st.text(max_size=200), st.integers(0, 3000))
    def test_no_text_makes_it_raise(self, noise: str, at: int) -> None:
        page = documented("dcgm_4.txt").decode()
        for gpu in read_dcgm(page[:at] + noise + page[at:]):
            assert gpu.use is None or 0.0 <= gpu.use <= 1.0


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async def page(request: web.Request) -> web.Response:
        if request.path == "/big":
            return web.Response(body=b"x" * (9 << 20))
        return web.Response(body=documented("dcgm_4.txt") if request.path == "/metrics" else b"up 1")

    async def fails(_: web.Request) -> web.Response:
        return web.Response(status=503)

    port = free_port()
    app = web.Application()
    app.router.add_get("/fails", fails)
    app.router.add_get("/{any}", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield f"http://{{host}}:{port}"
    await runner.cleanup()


class TestDcgmOverHttp:
    async def test_each_host_has_its_own_page(self, url: str) -> None:
        pages = DcgmPages(f"{url}/metrics", 3)
        assert pages.place("10.0.0.1") != pages.place("10.0.0.2")
        gpus = await pages.read(pages.place("127.0.0.1"))
        assert [gpu.index for gpu in gpus] == [0, 1, 2]
        await pages.close()

    @pytest.mark.parametrize(
        ("path", "why"), [("/fails", "status 503"), ("/other", "has no DCGM_FI_DEV_GPU_UTIL"), ("/big", "larger than")]
    )
    async def test_trouble_says_what_and_where(self, url: str, path: str, why: str) -> None:
        pages = DcgmPages(url + path, 3)
        with pytest.raises(GpuError, match=why) as caught:
            await pages.read(pages.place("127.0.0.1"))
        assert path in str(caught.value)
        await pages.close()

    async def test_where_nothing_listens_it_says_so(self) -> None:
        pages = DcgmPages(f"http://127.0.0.1:{free_port()}/metrics", 3)
        with pytest.raises(GpuError, match="Cannot connect"):
            await pages.read(pages.place("127.0.0.1"))
        await pages.close()


class NVMLError(Exception):
    """As of the binding."""


def binding(**changes: Any) -> ModuleType:
    """A module like pynvml with two GPUs, the second of which is cut in parts."""
    made = ModuleType("pynvml")

    def rates(handle: int) -> SimpleNamespace:
        if handle == 1:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=40)

    made.__dict__.update(
        {
            "NVMLError": NVMLError,
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda i: i,
            "nvmlDeviceGetUUID": lambda handle: b"GPU-old" if handle else "GPU-new",
            "nvmlDeviceGetUtilizationRates": rates,
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=20, total=80),
            **changes,
        }
    )
    return made


def fails(text: str) -> Any:
    def call(*_: Any) -> None:
        raise NVMLError(text)

    return call


def missing() -> ModuleType:
    raise ImportError("no pynvml")


class TestNvml:
    def test_gpus_and_what_one_of_them_does_not_tell(self) -> None:
        assert NvmlLibrary(binding).gpus() == [Gpu(0, "GPU-new", None, 0.4, 0.25), Gpu(1, "GPU-old", None, None, 0.25)]

    def test_memory_of_no_size_is_unknown(self) -> None:
        [one, _] = NvmlLibrary(
            lambda: binding(nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=0, total=0))
        ).gpus()
        assert (one.use, one.memory) == (0.4, None)

    def test_without_the_binding_the_remedy_is_the_extra(self) -> None:
        with pytest.raises(GpuError, match=r"pip install 'extproc\[nvml\]'"):
            NvmlLibrary(missing).gpus()

    def test_without_a_driver_it_says_so_and_tries_again_later(self) -> None:
        found = [binding(nvmlInit=fails("NVML Shared Library Not Found")), binding()]
        library = NvmlLibrary(lambda: found.pop(0))
        with pytest.raises(GpuError, match=r"Library Not Found; gpu\.nvml needs NVIDIA's driver"):
            library.gpus()
        assert len(library.gpus()) == 2

    def test_a_gpu_that_is_lost_makes_it_begin_anew(self) -> None:
        begun: list[int] = []
        lost = binding(
            nvmlDeviceGetCount=fails("GPU is lost"), nvmlInit=lambda: begun.append(1), nvmlShutdown=fails("gone")
        )
        library = NvmlLibrary(lambda: lost)
        for _ in range(2):
            with pytest.raises(GpuError, match="GPU is lost"):
                library.gpus()
        assert begun == [1, 1]

    def test_the_real_binding_is_found_and_a_machine_without_gpus_says_so(self) -> None:
        """Or tells them, where it has some."""
        library, told, why = NvmlLibrary(), list[Gpu](), ""
        try:
            told += library.gpus()
        except GpuError as e:
            why = str(e)
        library.close()
        assert all(gpu.uuid for gpu in told) if told else "NVML" in why

    async def test_the_gpus_of_this_machine_are_those_of_every_host(self) -> None:
        local = LocalGpus(NvmlLibrary(binding))
        assert local.place("10.0.0.1") == local.place("10.0.0.2")
        assert len(await asyncio.wait_for(local.read(local.place("10.0.0.1")), 5)) == 2
        await local.close()
