"""The section `pools` of the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from extproc.config.base import (
    Address,
    Endpoint,
    Name,
    Seconds,
    Section,
    first_doubled,
)
from extproc.config.discovery import (
    Discovery,
)
from extproc.config.scaling import Scaling
from extproc.core.roles import BOOTSTRAP_PORT, Role, bootstrap_port, role, unknown_role


class ReplicaConfig(Section):
    """One inference engine."""

    address: Address
    """`ip:port` of its OpenAI-compatible server. An IP address, because Envoy names endpoints so."""
    labels: dict[str, str] = {}
    """`gpu` (a100, h100, h200, ...), `tp`, `pp`, `model_size` (8b, 70b, ...) give the prior of its speed; `max_tokens_per_s` its capacity for `token_aware`. Learning replaces the prior."""
    weight: float = Field(default=1.0, gt=0)
    """Share of traffic under the `weighted` policy."""
    drain: bool = False
    """Send nothing new there; what runs there may finish. The label `drain: "true"` means the same."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """A bare string is an address; label values may be written as numbers."""
        if isinstance(value, str):
            return {"address": value}
        if isinstance(value, dict) and isinstance(value.get("labels"), dict):
            labels = {k: str(v) if isinstance(v, int | float) else v for k, v in value["labels"].items()}
            return {**value, "labels": labels}
        return value


class Scrape(Section):
    """How the metrics of replicas are read."""

    path: str | None = Field(default=None, pattern=r"^/")
    """Path of the Prometheus page; null for the engine's own (`/metrics`, of trtllm-serve `/prometheus/metrics`)."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of that page on the replica's host (8002 for tritonserver, 8080 for nodes of Ray); null for the replica's own. The label `metrics: "ip:port,ip:port"` of a replica goes before it."""
    interval_s: Seconds = 0.5
    """Seconds between scrapes of a replica that has work."""
    idle_interval_s: Seconds = 5.0
    """Seconds between scrapes of a replica on which nothing runs."""
    timeout_s: float = Field(default=3.0, gt=1.0)
    """Seconds to wait for a page. Above 1: a busy engine answers late, and late is stale, not dead."""
    stale_after_s: Seconds = 10.0
    """A sample older than this many seconds no longer counts."""
    models_interval_s: Seconds = 30.0
    """Seconds between reads of `/v1/models`, from which LoRA adapters are learned."""


class UsageConfig(Section):
    """How token counts come back."""

    ask: bool = True
    """Add `stream_options.include_usage` to streaming requests that lack it. The extra chunk is taken out again in Envoy, or here where a gateway sends its responses through, so the client sees only what it asked for. Where it would not be read it is not asked for."""


class Health(Section):
    """When a replica is out, and when it is back. Requests of clients count as evidence beside the checks; 4xx and refusals of extproc never do."""

    interval_s: Seconds = 10.0
    """Seconds between checks of a replica that seems well."""
    doubt_interval_s: Seconds = 0.5
    """Seconds between checks of one that does not."""
    timeout_s: float = Field(default=3.0, gt=1.0)
    """Seconds to wait for an answer. Above 1: a busy engine answers late."""
    path: str | None = Field(default=None, pattern=r"^/")
    """Liveness: 200 there says that the process is alive. null for the engine's own (`/health`, of Triton `/v2/health/live`, of Ray Serve `/-/healthz`). Readiness is a model in the list of `/v1/models`."""
    deep_interval_s: float | None = Field(default=None, gt=0)
    """Seconds between checks that generate one token, on a replica that is idle. null for none."""
    failures: int = Field(default=3, ge=1)
    """Checks, or requests, that fail in a row before a replica is taken out."""
    successes: int = Field(default=2, ge=1)
    """That succeed in a row before it is back."""
    window_s: Seconds = 30.0
    """Seconds over which the share of failed requests is taken."""
    failure_rate: float = Field(default=0.5, gt=0, le=1)
    """Share of failed requests in the window above which a replica is taken out."""
    min_requests: int = Field(default=10, ge=1)
    """Requests in the window below which their share says nothing."""
    open_s: Seconds = 1.0
    """Seconds for which a replica is out after requests failed; then it gets one request on trial. They double with each trial that fails."""
    max_open_s: Seconds = 60.0
    """Longest time out between two trials, seconds."""
    suspect_s: Seconds = 2.0
    """After a single failure a replica is passed over for so many seconds, or until it is heard of again."""
    hang_s: Seconds = 5.0
    """Least seconds without any sign of work, while there is work, after which a replica counts as hung."""
    hang_factor: float = Field(default=3.0, ge=1)
    """A first token is overdue after so many times the predicted time, but not before `hang_s`."""
    slow_start_s: float = Field(default=10.0, ge=0)
    """Seconds in which a new or returned replica grows into its full share; 0 for at once."""


class Queue(Section):
    """Late binding: requests that would wait on any replica wait here instead, in order of priority, fair between tenants, and are placed when there is room."""

    enabled: bool = True
    """false: every request is placed at once, and waits in the engine."""
    hold_above_s: Seconds = 0.5
    """A request is held while every candidate would let it wait for longer than so many seconds. Lower gives the order here more to say, higher keeps replicas busy when news of them is late."""
    max_requests: int = Field(default=1000, ge=1)
    """Most requests held; beyond, the one that would go last is refused with 429."""
    max_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    """Most bytes of bodies held; beyond, likewise."""
    max_wait_s: float = Field(default=30.0, gt=0, le=3600)
    """Longest wait in seconds; then 429. Clients with `x-slo-ttft-ms` may ask for less."""
    absent_wait_s: float = Field(default=10.0, ge=0, le=3600)
    """Longest wait in seconds while no replica can be reached; then 503. 0: at once."""
    starved_after_s: Seconds = 5.0
    """Against starvation: a request that waited for so many seconds may go before those of higher priority,"""
    starved_share: float = Field(default=0.1, ge=0, lt=1)
    """as long as such requests get at most this share of the tokens sent off. 0 makes priority absolute."""
    ageing: float = Field(default=0.1, ge=0)
    """Of one tenant the shortest prefill goes first; what a request has waited counts, times this, as prefill less. 0 never lets long prompts catch up, large values are first come, first served."""


class KvEvents(Section):
    """Listen to what replicas tell of their KV caches (the KV events of vLLM and SGLang, over ZMQ), so that what of a prompt is cached where is known instead of guessed. Needs `pip install 'extproc[events]'`. See docs/kv-events.md."""

    mode: Literal["auto", "connect", "bind"] = "auto"
    """`connect`: to `endpoint` of each replica. `auto`: each is asked (`GET /kv_event_sources`, vLLM after 0.28); where it does not know that path, as `connect`. `bind`: replicas connect to `bind`, with a topic that names them."""
    endpoint: Endpoint = "tcp://{host}:5557"
    """Where a replica publishes; `{host}` is its IP address. Its label `kv_events` overrules it."""
    replay_endpoint: Endpoint | None = None
    """Where it tells its last messages again, for those who join late or missed some (vLLM's `replay_endpoint`); its label `kv_replay` overrules it. null: nowhere, unless it answers otherwise in `mode: auto`."""
    bind: Endpoint | None = None
    """For `mode: bind`: where to listen, `tcp://*:5557` say. Each replica publishes under the topic `kv@ip:port@model`, with the address by which it is a member."""
    topic: str = Field(default="", max_length=256)
    """Only topics that begin so are listened to. Empty: all."""
    ranks: int | None = Field(default=None, ge=1, le=64)
    """Data parallel ranks of a replica that publish, each on a port of its own, counted up from those above, unless it answers otherwise in `mode: auto`. null: `data_parallel` of the pool. More than that where the engine chooses the rank itself."""
    max_queued: int = Field(default=4096, ge=16, le=100_000)
    """Most messages of a publisher that wait here; what does not fit is asked for again. Some 2 to 10 KB each."""
    replay_timeout_s: Seconds = 5.0
    """Seconds without a further message after which a replay is given up. vLLM answers between two steps."""

    @model_validator(mode="after")
    def _listens(self) -> Self:
        if self.mode == "bind" and self.bind is None:
            raise ValueError("mode: bind has nowhere to listen; add bind: tcp://*:5557")
        if self.mode != "bind" and self.bind is not None:
            raise ValueError(f"bind counts in mode: bind alone, and mode is {self.mode}; remove one of them")
        if self.bind is not None and "{host}" in self.bind:
            raise ValueError("bind is an address of this host; write tcp://*:5557 instead of {host}")
        if "*" in self.endpoint or "*" in (self.replay_endpoint or ""):
            raise ValueError("* is where an engine listens; to connect there write tcp://{host}:5557")
        return self


class TokenizerConfig(Section):
    """Tokenize prompts here as the engine will, so that what its KV events tell can be matched exactly. Needs `pip install 'extproc[tokenizers]'`. See docs/precise.md."""

    path: Path | None = None
    """Folder of the served model: `tokenizer.json`, `tokenizer_config.json`, its chat template, `config.json`. Weights are not needed. null: only with `simulated`."""
    simulated: bool = False
    """The tokens of simulated replicas (`extproc backend`) in place of a model's: to try this without a model."""
    chat_template: Path | None = None
    """Chat template in a file, where the engine was given one (`--chat-template`)."""
    content_format: Literal["auto", "string", "openai"] = "auto"
    """As the engine's `--chat-template-content-format`."""
    template_values: dict[str, Any] = {}
    """As the engine's `--default-chat-template-kwargs`."""
    timeout_s: float = Field(default=0.05, gt=0, le=5)
    """Longest that a request waits for its tokens, seconds; later, the approximate index decides. Less than `envoy.message_timeout_s`."""
    cache_bytes: int = Field(default=64 * 1024 * 1024, ge=0)
    """Room for pieces of prompts that were tokenized, so that a conversation pays for its new part alone. 0: none."""
    threads: int = Field(default=2, ge=1, le=64)
    """Prompts tokenized at one time."""

    @model_validator(mode="after")
    def _whose(self) -> Self:
        if self.simulated == (self.path is not None):
            raise ValueError(
                "needs either path, the folder of the served model, or simulated: true for extproc backend"
            )
        return self


class Gpus(Section):
    """Where the use of the GPUs of each replica is read: for the policy `gpu_utilization`, for metrics, and for scaling where `scaling.gpu_url` is null. Which GPUs are a replica's is told by its labels `gpu_index: "0,1"`, `gpu_uuid` or `pod`, by `ports`, or by its being the only one there. See docs/engines.md."""

    url: str | None = Field(default=None, pattern=r"^https?://")
    """Page of a DCGM exporter; `{host}` in it is the IP address of each replica, for one exporter on each node (`http://{host}:9400/metrics`)."""
    nvml: bool = False
    """Read the GPUs of this machine through NVML instead, where extproc runs beside them. Needs `pip install 'extproc[nvml]'`."""
    interval_s: float = Field(default=5.0, gt=0, le=30)
    """Seconds between two looks; what was seen a minute ago no longer counts. A DCGM exporter itself looks every 30 s unless it is told otherwise (`-c`)."""
    timeout_s: Seconds = 3.0
    """Seconds to wait for a page."""
    ports: dict[int, tuple[int, ...]] = {}
    """Port of a replica: index of its GPUs on its host (`{8000: [0, 1], 8001: [2, 3]}`), for replicas without labels of that."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.url is None) is not self.nvml:
            raise ValueError("has no source, or two; keep one of url: http://... and nvml: true")
        return self


class LoraConfig(Section):
    """LoRA adapters of the replicas. Which replica has one is learned; see docs/lora.md."""

    load_s: float = Field(default=0.5, ge=0)
    """Seconds that an engine needs to load an adapter, as long as nothing was learned of it. 0 also where adapters stay loaded."""
    slots: int | None = Field(default=None, ge=1)
    """Adapters that a replica holds at once (vLLM's `--max-loras`), where it has not told; null: as many as another one of the pool told, and until one did nobody is expected to wait for a slot."""


class DisaggregationConfig(Section):
    """Prefill and decode on different replicas, told apart by their label `role`. See docs/disaggregation.md."""

    protocol: Literal["llm-d", "sglang"] = "llm-d"
    """How a replica that answers is told of another that computes the prompt: `llm-d` sends the headers `x-prefiller-host-port` and `x-llm-d-prefiller-host-port` to llm-d's side-car beside it, whatever the engine behind that. `sglang` needs no side-car: Envoy sends the request to both, with `bootstrap_host`, `bootstrap_port` and `bootstrap_room` in its body."""
    bootstrap_port: int = Field(default=8998, ge=1, le=65_535)
    """With `sglang`: the `--disaggregation-bootstrap-port` of replicas that prefill and have no label `bootstrap_port`."""
    local_prefill: bool = True
    """Replicas with the role `decode` can compute prompts as well, and do where that costs less. false: they cannot, as SGLang's."""
    kv_bytes_per_token: float = Field(default=131_072, gt=0)
    """Size of the KV cache of one token. The default is that of Llama 3.1 8B in bf16; 70B has 327,680."""
    bandwidth_gbit_per_s: float = Field(default=100, gt=0)
    """Between two replicas, as long as nothing was learned of it by split requests."""
    latency_s: float = Field(default=0.01, ge=0)
    """Seconds of each transfer besides its size, likewise."""

    @field_validator("protocol", mode="before")
    @classmethod
    def _one_request(cls, value: Any) -> Any:
        if value == "vllm":
            raise ValueError(
                "vllm needs two requests that differ, and a proxy sends one; put llm-d's side-car beside the replicas, "
                "with its connector for vLLM, and write llm-d"
            )
        return value

    @property
    def mirrors(self) -> bool:
        """Whether the proxy sends a split request to both replicas."""
        return self.protocol == "sglang"

    @model_validator(mode="after")
    def _one_role_each(self) -> Self:
        if self.mirrors and self.local_prefill:
            raise ValueError("protocol sglang needs local_prefill: false, for an engine of SGLang's has one role")
        return self


class PoolConfig(Section):
    """Replicas that serve the same models."""

    name: Name = "default"
    """Name in metrics, logs and Envoy's cluster name."""
    models: tuple[str, ...] = ()
    """Model names that this pool serves, LoRA adapters included; what replicas list in `/v1/models` is added. Empty: whatever the replicas list, and anything while they have not been asked yet."""
    engine: Literal["auto", "vllm", "sglang", "tgi", "trtllm", "triton", "ray", "none"] = "auto"
    """What the replicas run: whose metrics to read. `auto` finds out for each replica by its page, so that a pool may mix them. `none` reads no metrics. See docs/engines.md."""
    lora: LoraConfig = LoraConfig()
    data_parallel: int = Field(default=1, ge=1, le=64)
    """Data parallel ranks of each replica (`--data-parallel-size`), all behind its one address: each then counts as a replica of its own, and is chosen by header. 1 also where the engine shall choose by itself. See docs/engines.md."""
    policy: str = "predicted"
    """How a replica is chosen; see docs/policies.md for the list."""
    policy_options: dict[str, float | int | str | bool] = {}
    """Options of the policy; docs/policies.md names each with its default."""
    replicas: tuple[ReplicaConfig, ...] = ()
    """Fixed members, each `{address, labels, weight}` or just `ip:port`."""
    discovery: Discovery | None = None
    """Where members come from, instead of `replicas`."""
    labels: dict[str, str] = {}
    """Labels that every replica of the pool has unless it says otherwise."""
    scrape: Scrape = Scrape()
    health: Health = Health()
    queue: Queue = Queue()
    scaling: Scaling | None = None
    """How many replicas there should be; null: nobody asks."""
    usage: UsageConfig = UsageConfig()
    gpu: Gpus | None = None
    """The use of each replica's GPUs; null: unknown."""
    kv_events: KvEvents | None = None
    """What replicas tell of their KV caches; null: what they hold is guessed by what was sent to them."""
    disaggregation: DisaggregationConfig | None = None
    """Prefill and decode on different replicas; null: every replica answers alone, whatever its labels. What is in it may change while extproc runs, whether it is there may not."""
    tokenizer: TokenizerConfig | None = None
    """How prompts become tokens; null: they are not tokenized, and `kv_events` count for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _labels_as_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("labels"), dict):
            return {**value, "labels": {k: str(v) for k, v in value["labels"].items()}}
        return value

    def _check_roles(self) -> None:
        labels = {replica.address: {**self.labels, **replica.labels} for replica in self.replicas}
        for address, each in labels.items():
            if role(each) is None:
                raise ValueError(f"has disaggregation and replica {address} with the {unknown_role(each)}")
        if wrong := next(
            (a for a, each in labels.items() if BOOTSTRAP_PORT in each and not bootstrap_port(each)), None
        ):
            raise ValueError(f"has replica {wrong} with a label {BOOTSTRAP_PORT} that is no port; write 1 to 65535")
        if labels and all(role(each) is Role.PREFILL for each in labels.values()):
            raise ValueError(
                "has disaggregation and only replicas with the role prefill, so nobody answers; add others"
            )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.replicas and self.discovery:
            raise ValueError("has both replicas and discovery; keep one")
        if not self.replicas and not self.discovery:
            raise ValueError("has no members; add replicas: [ip:port] or discovery: {file: {path: ...}}")
        if doubled := first_doubled(r.address for r in self.replicas):
            raise ValueError(f"lists replica {doubled} twice; remove one")
        if self.policy == "gpu_utilization" and self.gpu is None:
            raise ValueError(
                "has policy gpu_utilization, but nothing tells of GPUs; add gpu: {url: ...} or {nvml: true}"
            )
        if self.data_parallel > 1 and self.engine not in ("auto", "vllm", "sglang", "none"):
            raise ValueError(f"has data_parallel, but of {self.engine} no rank can be chosen by header; remove it")
        if self.disaggregation is not None:
            self._check_roles()
        if self.data_parallel > 1 and self.disaggregation is not None:
            raise ValueError("has both data_parallel and disaggregation, whose headers name no rank; keep one")
        if self.data_parallel > 1 and self.scaling is not None:
            raise ValueError("has both data_parallel and scaling, which would count ranks; keep one")
        if self.from_zero and not self.queue.enabled:
            raise ValueError(
                "has scaling.min_replicas: 0 but no queue to wait in; set queue.enabled: true, or 1 replica"
            )
        return self

    @property
    def mirrors(self) -> bool:
        """Whether the proxy sends some requests to two replicas."""
        return self.disaggregation is not None and self.disaggregation.mirrors

    @property
    def from_zero(self) -> bool:
        """Whether the pool may be empty, so that requests wait for its first replica."""
        return self.scaling is not None and self.scaling.min_replicas == 0

    @property
    def absent_wait_s(self) -> float:
        """Longest wait while no replica can be reached."""
        start_s = self.scaling.start_wait_s if self.scaling is not None and self.from_zero else 0.0
        return max(self.queue.absent_wait_s, start_s)
