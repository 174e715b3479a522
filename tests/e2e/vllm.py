"""Real vLLM replicas on CPU, as children of the test.

The caller names them by environment: VLLM is a virtual environment with vLLM 0.32, MODEL a folder with a small model; its weights are not read.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final, Self

import aiohttp

from tests.support.ports import free_port
from tests.support.waiting import until

MODEL = "tiny"
BLOCK_SIZE, NUM_BLOCKS = 32, 200
START_WITHIN_S = 300.0
"""35 s on two idle cores for one, about twice that for two at once."""
STOP_WITHIN_S = 20.0

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
LORA_ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""With adapters only: several API servers, as of data parallel ranks, refuse it."""
OPTIONS = (
    *("--served-model-name", MODEL, "--host", "127.0.0.1"),
    *("--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager"),
    *("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-seqs", "8"),
    *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
)


def paths() -> tuple[Path, Path]:
    """The `vllm` command and the model. Raises RuntimeError where the caller names none: asked for, these tests must not pass unseen."""
    try:
        command, model = Path(os.environ["VLLM"]) / "bin" / "vllm", Path(os.environ["MODEL"])
    except KeyError as e:
        raise RuntimeError(f"set {e.args[0]}: make test-vllm VLLM=/path/to/venv MODEL=/path/to/tiny-llama") from None
    for path in (command, model / "config.json"):
        if not path.exists():
            raise RuntimeError(f"{path} does not exist; VLLM is a virtual environment, MODEL a model folder")
    return command, model


_TEXT = "the a of to in and is for on that with as it was by at from be or"
WORDS: Final = tuple(_TEXT.split())


def words(rng: Random, count: int) -> str:
    """Some of few: so that prompts of the same seed begin alike, and others do not."""
    return " ".join(rng.choices(WORDS, k=count))


def adapters() -> list[str]:
    """Names of the LoRA adapters beside the model; their folders are called so."""
    return sorted(path.name for path in Path(os.environ["MODEL"]).parent.glob("lora-*"))


def kv_events(endpoint: str, replay: str, topic: str = "kv-events") -> tuple[str, ...]:
    """Options of an engine that tells of its KV cache, with the adapters that there are."""
    events = {"enable_kv_cache_events": True, "endpoint": endpoint, "replay_endpoint": replay, "topic": topic}
    folder, names = Path(os.environ["MODEL"]).parent, adapters()
    lora = ("--enable-lora", "--lora-modules", *(f"{name}={folder / name}" for name in names)) if names else ()
    return ("--kv-events-config", json.dumps(events), *lora)


class Vllm:
    """One replica, in a process group of its own: the server, and its engine as a child of that."""

    def __init__(self, directory: Path, *options: str) -> None:
        """`options`: for its command line, beside those of all."""
        self.port = free_port()
        self.log = directory / f"vllm-{self.port}.log"
        self._options = options
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<vllm {self.address}>"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def __aenter__(self) -> Self:
        command, model = paths()
        more = LORA_ENVIRONMENT if "--enable-lora" in self._options else {}
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *map(str, (command, "serve", model, "--port", self.port, *OPTIONS, *self._options)),
                env={**os.environ, **ENVIRONMENT, **more},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_WITHIN_S)
            except TimeoutError:
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()

    async def ready(self) -> None:
        """Wait until it answers. Raises AssertionError with the end of its log."""
        async with aiohttp.ClientSession() as http:
            await until(lambda: self._healthy(http), timeout_s=START_WITHIN_S, every_s=0.5)

    async def _healthy(self, http: aiohttp.ClientSession) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, self.log.read_text(errors="replace")[-3000:]
        try:
            async with http.get(f"{self.url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    def signal_engine(self, number: signal.Signals) -> None:
        """To the engine alone: the server in front of it goes on and answers probes."""
        [engine] = [pid for pid in self._group() if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(engine, number)

    async def terminate(self) -> None:
        """As Kubernetes does it; returns when nothing listens there any more. The process may take longer to end."""
        assert self._process is not None
        self._process.terminate()
        await until(self._refuses, timeout_s=STOP_WITHIN_S)

    async def _refuses(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return True
        writer.close()
        return False

    def _group(self) -> list[int]:
        assert self._process is not None
        return [
            pid for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()) if self._is_ours(pid)
        ]

    def _is_ours(self, pid: int) -> bool:
        assert self._process is not None
        try:
            return os.getpgid(pid) == self._process.pid
        except ProcessLookupError:
            return False
