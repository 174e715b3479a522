"""A simulated vLLM replica behind HTTP: for tests, the demo fleet and benchmarks.

async with Backend(BackendSpec(port=8000, labels={"gpu": "h100", "model_size": "8b"})) as backend:
    ...  # backend.address, backend.hang = True, backend.engine
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final, Self, TypeAlias

import orjson
from aiohttp import web

from extproc.config import ConfigError
from extproc.openai.simulated_prompt import TOKEN_BYTES
from extproc.sim import text, vllm_replies, vllm_requests
from extproc.sim.engine import Engine, EngineRequest
from extproc.sim.realtime import Flow, RealtimeEngine
from extproc.sim.spec import BackendSpec, load_specs
from extproc.sim.vllm_errors import ApiError, failing
from extproc.sim.vllm_metrics import Metrics
from extproc.sim.vllm_replies import Answer, Reply, Reporting
from extproc.sim.vllm_requests import Job, Limits, Reader

if TYPE_CHECKING:
    from extproc.sim.kv_publisher import Chains, KvPublisher

__all__ = ["Backend", "BackendSpec", "load_specs", "serve"]

VERSION: Final = "0.32.0"
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
_HEADERS: Final = {"server": "uvicorn", "vary": "Origin"}
_SSE: Final = {**_HEADERS, "content-type": "text/event-stream; charset=utf-8"}

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Backend:
    """The server. What tests change while it runs: `fail_with`, `hang`, `drop_usage`."""

    def __init__(self, spec: BackendSpec) -> None:
        self.spec = spec
        self.fail_with = spec.fail_with
        self.drop_usage = spec.drop_usage
        self.publisher: KvPublisher | None = None
        """Of KV events, where the replica tells them."""
        self._chains: Chains | None = None
        self.engine = Engine(spec.engine_config()) if spec.kv_events is None else self._telling(spec, spec.kv_events)
        self.realtime = RealtimeEngine(self.engine, spec.time_scale)
        self.realtime.hang = spec.hang
        self.metrics = Metrics(self.realtime, spec.model)
        self.in_flight = 0
        """Completions accepted and not ended."""
        self.served = 0
        """Completions accepted since the start."""
        self.port = spec.port
        limits = Limits((spec.model, *spec.adapters), self.engine.config.max_model_len)
        self._limits, self._lengths = limits, text.OutputLength(mean=spec.mean_output_tokens)
        self._created = int(time.time())
        self._numbers = itertools.count()
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        return f"<backend {self.address} {self.in_flight} in flight, {self.engine!r}>"

    @property
    def address(self) -> str:
        """`ip:port`."""
        return f"{self.spec.host}:{self.port}"

    @property
    def hang(self) -> bool:
        return self.realtime.hang

    @hang.setter
    def hang(self, value: bool) -> None:
        self.realtime.hang = value

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        # Cancelling the handler is how a client's disconnect reaches the engine.
        self._runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.spec.host, self.spec.port, backlog=1024)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.realtime.start()
        if self.publisher is not None:
            try:
                self.publisher.start()
            except OSError:
                await self.stop()
                raise

    async def stop(self) -> None:
        """Refuse connections and break off what runs."""
        if self._runner:
            await self._runner.cleanup()
        await self.realtime.stop()
        if self.publisher is not None:
            await self.publisher.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_like_fastapi])
        post, get = app.router.add_post, app.router.add_get
        post("/v1/chat/completions", self._completions(vllm_requests.chat, self._chat))
        post("/v1/completions", self._completions(vllm_requests.completions, self._completion))
        post("/v1/responses", self._completions(vllm_requests.responses, self._response))
        post("/v1/embeddings", self._embeddings)
        for path in ("/health", "/ping"):
            get(path, self._health, allow_head=False)
        post("/ping", self._health)
        get("/metrics", self._metrics, allow_head=False)
        get("/version", self._version, allow_head=False)
        get("/v1/models", self._models, allow_head=False)
        get("/load", self._load, allow_head=False)
        get("/kv_event_sources", self._kv_event_sources, allow_head=False)
        return app

    def _telling(self, spec: BackendSpec, port: int) -> Engine:
        """An engine whose KV events are published. Raises ConfigError without pyzmq."""
        try:
            from extproc.sim.kv_publisher import Chains, KvPublisher, ToldEngine
        except ModuleNotFoundError:
            raise ConfigError("kv_events: needs the package pyzmq; pip install 'extproc[events]'") from None
        config = spec.engine_config()
        replay = (port + 1 if port else 0) if spec.kv_replay is None else spec.kv_replay
        self.publisher = KvPublisher(spec.host, port, replay)
        self._chains = Chains(config.block_size, spec.adapters)
        return ToldEngine(config, self._chains, self.publisher)

    # --- completions --------------------------------------------------------------------------------------------------

    def _completions(self, reader: Reader, reply: Callable[[str, Job, list[Answer]], Reply]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                job = await self._accept(request, reader)
            except ApiError as e:
                return _json(e.body(), e.status)
            answers = self._answers(job)
            respond = self._stream if job.stream else self._plain
            return await respond(request, job, answers, reply(_request_id(request), job, answers))

        return handle

    async def _accept(self, request: web.Request, reader: Reader) -> Job:
        raw = await request.read()
        if self.fail_with:
            raise failing(self.fail_with)
        job = vllm_requests.read(raw, reader, self._limits)
        if self.spec.max_in_flight is not None and self.in_flight >= self.spec.max_in_flight:
            raise failing(503)
        return job

    def _answers(self, job: Job) -> list[Answer]:
        """One for each sample of each prompt; their lengths and texts depend on the prompt alone."""
        numbered = enumerate((p, s) for p in job.prompts for s in range(job.samples))
        return [self._answer(job, i, prompt, sample) for i, (prompt, sample) in numbered]

    def _answer(self, job: Job, index: int, prompt: bytes, sample: int) -> Answer:
        prompt_tokens = len(prompt) // TOKEN_BYTES
        # vLLM's answer to a limit that does not fit behind the prompt is not recorded; the context simply ends there.
        room = self._limits.max_model_len - prompt_tokens
        limit = room if job.max_tokens is None else min(job.max_tokens, room)
        seed = text.prompt_seed(prompt) + sample
        length = limit if job.fixed_length else self._lengths.draw(seed, limit)
        return Answer(index, prompt_tokens, text.answer(seed, length), "length" if length == limit else "stop")

    def _reporting(self, job: Job) -> Reporting:
        continuous = job.include_usage and job.continuous_usage
        return Reporting(not self.drop_usage, self.spec.cached_tokens, job.include_usage, continuous)

    def _chat(self, id_: str, job: Job, answers: list[Answer]) -> Reply:
        report = self._reporting(job)
        return vllm_replies.Chat(f"chatcmpl-{id_}", int(time.time()), job.model, answers, job.samples, report)

    def _completion(self, id_: str, job: Job, answers: list[Answer]) -> Reply:
        report = self._reporting(job)
        return vllm_replies.Completion(f"cmpl-{id_}", int(time.time()), job.model, answers, job.samples, report)

    def _response(self, id_: str, job: Job, answers: list[Answer]) -> Reply:
        return vllm_replies.Responses(f"resp_{id_}", int(time.time()), job.model, answers, self._reporting(job))

    async def _stream(self, request: web.Request, job: Job, answers: list[Answer], reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers=_SSE)
        # A client that leaves between two tokens is seen by the write, before the handler is cancelled.
        with suppress(ConnectionResetError), _Run(self, job, answers, every=True) as run:
            await response.prepare(request)  # headers go out before the first token, as vLLM's do
            if opening := reply.opening():
                await response.write(opening)
            while pieces := await run.next():
                await response.write(b"".join([reply.piece(answer, position) for answer, position in pieces]))
            await response.write(reply.closing())
        return response

    async def _plain(self, _: web.Request, job: Job, answers: list[Answer], reply: Reply) -> web.StreamResponse:
        await self._wait(job, answers)
        return _json(reply.whole())

    async def _wait(self, job: Job, answers: list[Answer]) -> None:
        with _Run(self, job, answers, every=False) as run:
            while await run.next():
                pass

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        try:
            job = await self._accept(request, vllm_requests.embeddings)
        except ApiError as e:
            return _json(e.body(), e.status)
        answers = self._answers(job)
        await self._wait(job, answers)
        return _json(vllm_replies.embeddings(f"embd-{_request_id(request)}", int(time.time()), job.model, answers))

    def engine_requests(self, job: Job, answers: Iterable[Answer]) -> dict[int, tuple[Answer, EngineRequest]]:
        """What the engine shall run, by its id there."""
        size = self.engine.config.block_size
        hashed = [
            text.block_hashes(job.prompts[a.index // job.samples] + a.text, size, job.model, job.salt) for a in answers
        ]
        return {
            (i := next(self._numbers)): (a, self._engine_request(i, a, hashes, job.model))
            for a, hashes in zip(answers, hashed, strict=True)
        }

    def _engine_request(self, number: int, answer: Answer, hashes: Sequence[int], model: str) -> EngineRequest:
        adapter = model if model in self.spec.adapters else None
        tokens = len(answer.text) // TOKEN_BYTES
        return EngineRequest(number, answer.prompt_tokens, tokens, hashes, adapter=adapter)

    def tells(self, job: Job, sequences: Iterable[tuple[Answer, EngineRequest]]) -> list[Callable[[], None]]:
        """KV events may name what these hold from now on, until each of the results is called."""
        if self._chains is None:
            return []
        return [
            self._chains.enter(r.hashes, job.prompts[a.index // job.samples] + a.text, job.model, job.salt)
            for a, r in sequences
        ]

    # --- everything else ----------------------------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(headers=_HEADERS)

    async def _metrics(self, _: web.Request) -> web.Response:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=self.metrics.page(), headers={**_HEADERS, "content-type": content_type})

    async def _version(self, _: web.Request) -> web.Response:
        return _json(b'{"version":"%s"}' % VERSION.encode())

    async def _models(self, _: web.Request) -> web.Response:
        return _json(
            vllm_replies.models(self.spec.model, self.spec.adapters, self._limits.max_model_len, self._created)
        )

    async def _load(self, _: web.Request) -> web.Response:
        return _json(b'{"server_load":%d}' % self.in_flight)

    async def _kv_event_sources(self, _: web.Request) -> web.Response:
        if self.publisher is None:
            return _json(b"{}")
        source = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.publisher.endpoint,
            "replay_endpoint": self.publisher.replay_endpoint,
            "topic": self.publisher.topic,
        }
        return _json(orjson.dumps({"0": source}))


class _Run:
    """The sequences of one HTTP request in the engine, from submission to withdrawal: leaving it in any way frees them."""

    def __init__(self, backend: Backend, job: Job, answers: list[Answer], every: bool) -> None:
        self._backend, self._job = backend, job
        self._sequences = backend.engine_requests(job, answers)
        self._told: list[Callable[[], None]] = []
        self._flow = Flow(every)
        self._open = len(self._sequences)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._backend.realtime.submit((request for _, request in self._sequences.values()), self._flow)
        self._told = self._backend.tells(self._job, self._sequences.values())
        self._backend.in_flight += 1
        self._backend.served += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.realtime.withdraw(self._sequences)
        for forget in self._told:
            forget()
        self._backend.in_flight -= 1

    async def next(self) -> list[tuple[Answer, int]]:
        """Answers and the positions of their new tokens; empty when all have ended."""
        if not self._open:
            return []
        pieces = []
        for token in await self._flow.get():
            answer = self._sequences[token.id][0]  # type: ignore[index]  # our ids are numbers
            answer.emitted, answer.cached_tokens = token.position + 1, token.cached_tokens
            if token.first:
                self._backend.metrics.first_token(time.monotonic() - self._started)
            if token.finished:
                self._open -= 1
                self._backend.metrics.finished(time.monotonic() - self._started, answer.finish_reason)
            pieces.append((answer, token.position))
        return pieces


def _request_id(request: web.Request) -> str:
    return request.headers.get("x-request-id") or uuid.uuid4().hex[:16]


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, headers=_HEADERS, content_type="application/json")


@web.middleware
async def _like_fastapi(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Unknown paths and methods in FastAPI's form."""
    try:
        response = await handler(request)
    except web.HTTPException as e:
        response = _json(b'{"detail":"%s"}' % e.reason.encode(), e.status)
        if "allow" in e.headers:
            response.headers["allow"] = e.headers["allow"]
    return response


async def serve(specs: Iterable[BackendSpec]) -> None:
    """Run replicas until cancelled."""
    async with AsyncExitStack() as stack:
        for spec in specs:
            await stack.enter_async_context(Backend(spec))
        await asyncio.Event().wait()
