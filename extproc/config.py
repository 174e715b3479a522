"""The configuration file: typed, frozen, a default and a docstring for each field, unknown keys refused with their dotted path.

`load(path)` is the only reader. docs/configuration.md is generated from the docstrings below.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from extproc import config_models, redis_url
from extproc.config_base import Name as Name
from extproc.config_base import Seconds as Seconds
from extproc.config_base import Section as Section
from extproc.config_models import ModelConfig as ModelConfig
from extproc.config_models import ProviderConfig as ProviderConfig
from extproc.config_models import TargetConfig as TargetConfig
from extproc.config_models import WhenConfig as WhenConfig
from extproc.core.policies import PolicyError, create
from extproc.core.roles import Role, role, unknown_role

READING_LIMIT_S = 10.0
"""Longest time until a large body is read, the wait for a reader included."""


class ConfigError(Exception):
    """The configuration cannot be used; the text names each place by its dotted path, and the remedy."""


def _address(value: str) -> str:
    """`ip:port`, as Envoy will name it: a host name would never equal the endpoint that Envoy reports."""
    host, _, port = value.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        hint = "127.0.0.1" if host == "localhost" else "the IP address"
        raise ValueError(f"{value!r} is not ip:port; write {hint} instead of {host!r}") from None
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{value!r} has no port between 1 and 65535; write ip:port")
    return f"[{ip}]:{int(port)}" if ip.version == 6 else f"{ip}:{int(port)}"


def _listener(value: str) -> str:
    """`ip:port` or `unix:/path`."""
    if value.startswith("unix:"):
        if not value.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{value!r} needs an absolute path; write unix:/run/extproc/grpc.sock")
        return value
    return _address(value)


def zmq_endpoint(value: str) -> str:
    """`tcp://host:port` of ZMQ, with `{host}` or `*` in the place of the host where that is a replica's, or any of ours."""
    found = re.fullmatch(r"tcp://(\{host\}|\*|[0-9A-Za-z_.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", value)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"{value!r} is not tcp://host:port; write tcp://{{host}}:5557 for port 5557 of each replica")
    return value


Address = Annotated[str, AfterValidator(_address)]
Endpoint = Annotated[str, AfterValidator(zmq_endpoint)]
Listener = Annotated[str, AfterValidator(_listener)]
S = TypeVar("S", bound="Section")


class Listen(Section):
    """Where extproc itself listens. Both default to loopback: neither port has authentication."""

    grpc: Listener = "127.0.0.1:9002"
    """Envoy's gRPC: ext_proc, access log and health. `ip:port`, or `unix:/path` for a socket."""
    http: Listener = "127.0.0.1:9003"
    """Metrics, probes and inspection over HTTP. `ip:port` or `unix:/path`."""


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


class FileDiscovery(Section):
    """Replicas listed in a file that may change while extproc runs."""

    path: Path
    """YAML or JSON: a list like `replicas`, or an object with that key. Replace it by rename; a file that does not parse changes nothing and is counted."""


LabelNames = dict[str, str]
"""Label of the replica -> key of the pod label that it is taken from."""

POD_LABELS: LabelNames = {name: name for name in ("gpu", "tp", "pp", "model_size", "max_tokens_per_s", "role", "drain")}


class Cluster(Section):
    """What all that asks a Kubernetes API server has in common. Needs `pip install 'extproc[kubernetes]'`."""

    namespace: Name | None = None
    """Namespace of the pods; null for that of the service account, or of the kubeconfig's context."""
    pod_labels: LabelNames = POD_LABELS
    """Label of the replica: key of the pod label that it is taken from (`gpu: nvidia.com/gpu.product`). With `drain`, `kubectl label pod NAME drain=true` lets a replica finish what it has. Empty: none."""
    kubeconfig: Path | None = None
    """For use outside the cluster; its current context counts. null: the service account, else `$KUBECONFIG`, else `~/.kube/config`."""
    resync_s: Seconds = 300.0
    """Seconds after which everything is listed again, whatever the watch told."""


class KubernetesDiscovery(Cluster):
    """The pods behind a Kubernetes Service, from its EndpointSlices."""

    service: Name | None = None
    """Name of the Service."""
    selector: str | None = None
    """Label selector of EndpointSlices, instead of `service` or in addition to it. Slices bear the labels of their Service."""
    port: Annotated[int, Field(ge=1, le=65535)] | str | None = None
    """Name of the slices' port, or a number. null: their only port, or the one called `http`."""
    pod_selector: str | None = None
    """Label selector of the pods whose labels are read; null for all of the namespace. The same as the Service's spares memory where others run there too."""

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if not self.service and not self.selector:
            raise ValueError("selects nothing; add service: NAME or selector: key=value")
        return self


class InferencePoolDiscovery(Cluster):
    """The pods and ports that an InferencePool of the Gateway API inference extension selects."""

    name: Name
    """Name of the InferencePool."""
    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"] = "inference.networking.k8s.io"
    """API group: v1 of the first, v1alpha2 of the second."""


class DnsDiscovery(Section):
    """The addresses that a DNS name has: of a headless Service, say. Needs `pip install 'extproc[dns]'`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})$")
    """A or AAAA records are asked for where `port` is given, else SRV records. Of a name with both kinds of addresses the A records count."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of every replica; null to learn it from SRV records."""
    interval_s: Seconds = 30.0
    """Most seconds between two questions. The TTL of the answer counts where it is shorter, down to one second."""
    servers: tuple[Address, ...] = ()
    """Name servers to ask, `ip:port`; none for those of `/etc/resolv.conf`."""


class Discovery(Section):
    """Where the members of a pool come from, instead of `replicas`. Exactly one source."""

    file: FileDiscovery | None = None
    """Watch a file."""
    kubernetes: KubernetesDiscovery | None = None
    """Watch EndpointSlices."""
    inference_pool: InferencePoolDiscovery | None = None
    """Watch an InferencePool and its pods."""
    dns: DnsDiscovery | None = None
    """Ask for a name again and again."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if not named:
            raise ValueError(f"names no source; add one of {', '.join(type(self).model_fields)}")
        if len(named) > 1:
            raise ValueError(f"names {' and '.join(named)}; keep one")
        return self


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


class Thresholds(Section):
    """Bounds of the rule `thresholds`."""

    queue_above: float = Field(default=50.0, ge=0)
    """One replica more where more requests wait, here and in the engines together,"""
    ttft_p95_above_s: float = Field(default=3.0, gt=0)
    """or where the 95th percentile of TTFT over the last minute is longer, in seconds,"""
    gpu_above: float = Field(default=0.85, gt=0, le=1)
    """or where GPU use is above this share."""
    queue_below: float = Field(default=10.0, ge=0)
    """One replica fewer where fewer requests wait, and"""
    gpu_below: float = Field(default=0.30, ge=0, le=1)
    """GPU use is below this share. Where `gpu_url` is null it is unknown, and there is no way down."""


class Warm(Section):
    """Spare replicas, which take requests like any other. Those that are no longer needed stay for a while before they are given up."""

    min_replicas: int = Field(default=2, ge=0)
    """Spares that are always there, beside the replicas that are needed."""
    max_replicas: int = Field(default=5, ge=0)
    """Most spares."""
    ttl_s: Seconds = 3600.0
    """Seconds for which a replica that is no longer needed stays as a spare."""


class Scaling(Section):
    """How many replicas the pool should have. Said in metrics and to KEDA; nothing is started or stopped here. See docs/autoscaling.md."""

    rule: Literal["work", "thresholds"] = "work"
    """`work`: the work that arrives, over what a replica does within its SLO. `thresholds`: one replica more or fewer where bounds are crossed."""
    min_replicas: int = Field(default=1, ge=0)
    """Least number. 0: the pool may be empty, and requests wait while its first replica starts."""
    max_replicas: int = Field(default=10, ge=1, le=10_000)
    """Greatest number."""
    ttft_target_s: Seconds = 0.5
    """Seconds in which a share `attainment` of the requests shall get their first token."""
    attainment: float = Field(default=0.95, gt=0, lt=1)
    """That share."""
    tpot_target_s: Seconds = 0.05
    """Seconds from one output token to the next that are good enough: bounds how many requests a replica decodes together."""
    max_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of its time that a replica may be at work, whatever the SLO leaves."""
    cold_start_s: float = Field(default=120.0, ge=0)
    """Seconds from the wish for a replica to its first answer: so far ahead growth is reckoned with. About 120 for a 7B model, 300 to 900 for 70B."""
    start_wait_s: float = Field(default=180.0, ge=0, le=3600)
    """With `min_replicas: 0`: longest wait in seconds for the first replica; then 503."""
    interval_s: Seconds = 15.0
    """Seconds between two looks."""
    up_cooldown_s: float = Field(default=60.0, ge=0)
    """Seconds between a way up and the next."""
    down_cooldown_s: float = Field(default=300.0, ge=0)
    """Seconds between a change and a way down. `work` also wants that no more was needed during all of them."""
    max_step_up: int = Field(default=4, ge=1)
    """Most replicas more at one time."""
    max_step_down: int = Field(default=4, ge=1)
    """Most replicas fewer at one time."""
    hysteresis: float = Field(default=0.2, ge=0, le=1)
    """Fewer replicas are asked for only where they would suffice for so much more work, as a share of what there is."""
    change_cost_s: float = Field(default=900.0, ge=0, le=86_400)
    """Replica-seconds that may be paid for, and not needed, to save a change of the number: `work` goes down when replicas that were not needed have cost so much, and goes up by what growth will need until then. 0: every change at once, for the fewest replica-hours."""
    thresholds: Thresholds = Thresholds()
    warm: Warm | None = None
    """Spare replicas; null for none."""
    daily: bool = False
    """Learn over days how many requests are usual at what time, and have replicas ready before they come. Learned in memory: a restart begins anew."""
    daily_lead_s: float = Field(default=600.0, ge=0, le=7200)
    """So many seconds before."""
    gpu_url: str | None = Field(default=None, pattern=r"^https?://")
    """Page with `DCGM_FI_DEV_GPU_UTIL` of the pool's GPUs (a DCGM exporter's, say): their mean is the GPU use of `thresholds`. null: the mean over the replicas where the pool has `gpu`, else unknown."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}; lower it")
        if self.warm is not None and self.min_replicas == 0:
            raise ValueError("has both min_replicas: 0 and warm, which is never empty; keep one")
        return self


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

    protocol: Literal["llm-d"] = "llm-d"
    """How a replica that answers is told of another that computes the prompt: `llm-d` sends the headers `x-prefiller-host-port` and `x-llm-d-prefiller-host-port` to llm-d's side-car beside it, whatever the engine behind that."""
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
        if value in ("vllm", "sglang"):
            raise ValueError(
                f"{value} needs a second request, which a proxy does not send; put llm-d's side-car beside the replicas, "
                "with its connector for that engine, and write llm-d"
            )
        return value


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
        if doubled := _doubled(r.address for r in self.replicas):
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
    def from_zero(self) -> bool:
        """Whether the pool may be empty, so that requests wait for its first replica."""
        return self.scaling is not None and self.scaling.min_replicas == 0

    @property
    def absent_wait_s(self) -> float:
        """Longest wait while no replica can be reached."""
        start_s = self.scaling.start_wait_s if self.scaling is not None and self.from_zero else 0.0
        return max(self.queue.absent_wait_s, start_s)


class Requests(Section):
    """What is read from requests."""

    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    """Largest request body in bytes; above it the client gets 413."""
    max_buffered_bytes: int = Field(default=512 * 1024 * 1024, ge=1024)
    """Most bytes of request bodies in this process at one time, held ones included; beyond, further requests are refused with 503."""
    max_json_depth: int = Field(default=128, ge=8, le=1000)
    """Deepest nesting of a request body; above it the client gets 400."""
    max_prompt_blocks: int = Field(default=1024, ge=16, le=1024)
    """Most blocks of a prompt that are hashed; what comes after them is not looked up in the prefix index."""
    large_body_bytes: int = Field(default=128 * 1024, ge=1024)
    """A body above this many bytes is read in a process of its own, so that it does not stall others."""
    max_flights: int = Field(default=100_000, ge=1)
    """Most requests in flight; beyond, further ones are refused with 503."""
    session_header: str = "x-session-id"
    """Header that names a session, for `session_affinity`. Stripped before the replica."""
    tenant_header: str | None = None
    """Header that names who asks (an API key, say). Only a keyed hash of it is kept."""
    objectives: dict[str, Annotated[int, Field(ge=-1_000_000, le=1_000_000)]] = {}
    """Name of an InferenceObjective: priority, the higher first. With any, the header `x-llm-d-inference-objective` (or `x-gateway-inference-objective`) gives a request its priority where `x-request-priority` does not; a name that is not here counts as none."""
    flight_ttl_s: Seconds = 30.0
    """A flight of which nothing was heard for this many seconds is closed as lost. Periodic entries of the access log renew it, and so does a response that is awaited here (docs/interplay.md), so it may be shorter than the longest generation; where a proxy sends none, set it above that."""


class EnvoyConfig(Section):
    """The Envoy bootstrap that `extproc envoy` renders."""

    listen: Listener = "0.0.0.0:10000"
    """Where Envoy takes requests."""
    admin: Address | None = "127.0.0.1:9901"
    """Envoy's admin interface; null for none."""
    endpoints_file: Path = Path("/var/lib/extproc/endpoints.json")
    """File of members and their health that extproc writes and Envoy watches. Both need the same path; its directory must exist. With several pools each has its own, with the pool's name before the suffix (`endpoints.<pool>.json`): Envoy takes one cluster from a file."""
    bootstrap_file: Path = Path("envoy.json")
    """Where `extproc envoy` writes the bootstrap."""
    fail_open: bool | None = None
    """When extproc does not answer, let requests pass by least request over the last known members. false: they fail with 503, or with 504 while extproc hangs and Envoy has not noticed. null: true, but false where `tenants.unknown` is `refuse`, for nobody is known then."""
    message_timeout_s: Seconds = 0.5
    """Seconds that Envoy waits for one answer of extproc."""
    connect_timeout_s: Seconds = 0.25
    """Seconds for a TCP connection to a replica."""
    endpoints: int = Field(default=3, ge=1, le=3)
    """Replicas that an answer names, best first: the others are for retries. 1 for gateways that take the pick for one address, as those do that route by an original destination cluster (Envoy AI Gateway)."""
    retries: int = Field(default=2, ge=0, le=5)
    """Attempts on further replicas, for all reasons together: no connection, a stream that was refused, and what the next two keys name. A request that kills the engine that runs it kills at most one more than this."""
    retry_resets: bool = True
    """Also send a request elsewhere whose replica died, or kept silent beyond all patience, before the headers of its response: a generation can be repeated. false: only where the request had not been sent; a request that kills engines then kills one."""
    retry_statuses: tuple[Annotated[int, Field(ge=500, le=599)], ...] = (500, 502, 503)
    """Statuses of a replica after which the next is asked. 500 is among them because vLLM answers so while it shuts down or its engine is dead; a fault of the request itself is then repeated `retries` times. 504 is not: whoever gave up waiting in front of the engine would be kept waiting again."""
    stream_idle_timeout_s: Seconds = 600.0
    """Seconds without a byte in either direction before Envoy gives a request up."""
    progress_interval_s: float | None = Field(default=1.0, ge=0.1)
    """Seconds between the access log entries of a request that still runs: first token seen, bytes so far. null for none."""
    log_flush_interval_s: Seconds = 0.1
    """Longest time that Envoy keeps access log entries back to batch them, seconds."""
    disabled_paths: tuple[str, ...] = ("/health", "/ping", "/v1/realtime")
    """Path prefixes that never go through extproc: probes, and upgrades, which ext_proc cannot carry."""
    response_headers: bool = False
    """Add `x-extproc-replica` (who answered) to responses."""
    access_log: Path | None = None
    """Also write Envoy's access log to this file, one JSON object a line; /dev/stdout works. null for none."""


class SharedTls(Section):
    """TLS to Redis: with `rediss` URLs."""

    ca_file: Path | None = None
    """Certificates (PEM) of the authorities that are trusted; null for those of the system."""
    cert_file: Path | None = None
    """Our own certificate (PEM), where the server asks for one."""
    key_file: Path | None = None
    """Its key."""
    check_hostname: bool = True
    """Whether the server's certificate has to name the host of the URL. It is verified in any case."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("has one of cert_file and key_file; a certificate needs its key, so name both or none")
        return self


class Shared(Section):
    """What several routers of one fleet tell one another through Redis. Requests never wait for it, and go on without it."""

    url: str = Field(repr=False)
    """`redis://host:6379`, `unix:///path`, `redis+sentinel://host:26379,host/service`, `redis+cluster://host,host`; `rediss` in the place of `redis` for TLS. It may have `user:password@`, percent-encoded."""
    username: str | None = None
    """ACL user, unless the URL names one; null for the default user."""
    password_file: Path | None = None
    """File with the password and nothing else; read again for each connection, so that it may change."""
    password_env: str | None = None
    """Environment variable with the password."""
    sentinel_auth: bool = False
    """Whether the Sentinels want the same user and password."""
    tls: SharedTls = SharedTls()
    prefix: str = Field(default="extproc", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,62}$")
    """First part of all keys. Fleets that share a Redis need one each; routers share what they know when this and the names of their pools are the same."""
    beat_s: float = Field(default=0.5, ge=0.02, le=1.0)
    """Seconds between two beats: at each this router publishes what it has, and reads what all others have."""
    push: bool = True
    """Whether routers also tell one another at once what they placed (PUBLISH and SUBSCRIBE)."""
    push_interval_s: float = Field(default=0.005, ge=0.001, le=1.0)
    """Least seconds between two pushes of this router; more where there are so many routers that each would hear over 400 a second."""
    beat_without_push_s: float = Field(default=0.05, ge=0.02, le=1.0)
    """Seconds between two beats, if that is less than `beat_s`, while pushes do not reach all routers."""
    expiry_s: float = Field(default=2.0, gt=0, le=5.0)
    """Seconds after which a router that published nothing is forgotten, with its load."""
    timeout_s: float = Field(default=0.5, ge=0.05)
    """Seconds that one beat may take, connecting included."""
    max_pause_s: float = Field(default=5.0, ge=0.1)
    """Most seconds between two tries while Redis cannot be used; the pause begins with two beats and doubles."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            parsed = redis_url.parse(self.url)
        except ValueError as e:
            raise ValueError(f"url {e}") from None
        if self.tls != SharedTls() and not parsed.tls:
            raise ValueError("has tls, but a url without it; write rediss in the place of redis")
        if sum(given is not None for given in (parsed.password, self.password_file, self.password_env)) > 1:
            raise ValueError("has several passwords; keep one of url, password_file and password_env")
        if parsed.username and self.username:
            raise ValueError("has two users, in url and in username; keep one")
        if self.expiry_s < 3 * self.beat_s:
            raise ValueError(f"expiry_s: {self.expiry_s:g} is less than three beats; set {3 * self.beat_s:g} or more")
        if self.timeout_s >= self.expiry_s:
            raise ValueError(f"timeout_s: {self.timeout_s:g} is not below expiry_s; set less than {self.expiry_s:g}")
        return self


class Limits(Section):
    """What a tenant may take up. null is no limit."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests a minute. So many may come at once; they come back evenly, one after a minute divided by the limit. See docs/tenants.md."""
    requests_burst: int | None = Field(default=None, ge=1)
    """Requests that may come at once; null for a minute's. 1 spaces them evenly, so that no minute has more than the limit."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and output tokens a minute, together. Estimated when a request comes, settled by what the replica reports."""
    in_flight: int | None = Field(default=None, ge=1)
    """Requests at one time, those that wait included. Routers that share count those of the others, as far as they have heard of them."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, as estimated; above it the client gets 400."""


class Tier(Limits):
    """What the tenants of a tier may do."""

    priority: int = Field(default=0, ge=-1_000_000, le=1_000_000)
    """Priority of requests that name none, and the highest that they may name: a client may lower its own."""
    slo_ttft_s: float | None = Field(default=None, gt=0)
    """Seconds to the first token, for requests without `x-slo-ttft-ms`: one that cannot have it in time is refused at once. null: they wait."""
    models: dict[str, Limits] = {}
    """Limits of single models, each counted apart. What a model does not name here holds for all those together that do not."""


class Tenant(Tier):
    """A tenant by its name. What is named here takes the place of what its tier says."""

    tier: Name | None = None
    """Its tier, unless its key or claims name another; null for `default_tier`."""
    metrics: bool = False
    """Count it apart in metrics, with its name as a label."""


class JwtClaims(Section):
    """Claims of tokens that Envoy's jwt_authn filter has verified, read from the metadata that it leaves."""

    payload: str = "jwt_payload"
    """`payload_in_metadata` of the filter's provider."""
    tenant_claim: str = "sub"
    """Claim that names the tenant; with dots for one inside another (`org.id`)."""
    tier_claim: str | None = None
    """Claim that names its tier; null for none."""


class TenantSharing(Section):
    """How limits are kept by several routers together, through the Redis of `shared`. Without that each router keeps its own."""

    on_loss: Literal["open", "closed"] = "open"
    """While Redis cannot be reached: open, each router applies the limits alone; closed, whoever has limits a minute gets 503."""
    strict: bool = False
    """true: a request for which this router has nothing leased waits for Redis. Otherwise a little may pass on credit, see docs/tenants.md."""
    strict_wait_s: float = Field(default=0.1, gt=0, le=5)
    """Longest such wait in seconds; then `on_loss` decides."""


TIERS: dict[str, Tier] = {
    "free": Tier(requests_per_minute=10),
    "paid": Tier(requests_per_minute=60),
    "enterprise": Tier(),
}


class Tenants(Section):
    """Who asks, and what they may take up. Of the ways to tell who asks, claims go before keys; where either is configured the header counts for nothing, for anybody can write one."""

    secret_file: Path | None = None
    """File with 16 random characters or more that nobody else knows: the key of all hashes of API keys and tenants. All routers of a fleet need the same. null: made up at the start. `extproc key add` creates one."""
    keys_file: Path | None = None
    """File of API keys, as hashes, followed while extproc runs. Clients send `authorization: Bearer KEY` or `x-api-key: KEY`. `extproc key add` writes entries."""
    jwt: JwtClaims | None = None
    """Read claims."""
    tier_header: str | None = None
    """Header that names the tier, beside `requests.tenant_header`. For gateways in front that set both; strip them from what clients send."""
    unknown: Literal["refuse", "anonymous"] = "refuse"
    """Who has no key or claims, or unknown ones: `refuse` with 401, or serve as anonymous. All the anonymous are one tenant."""
    anonymous_tier: Name = "free"
    """Tier of the anonymous."""
    default_tier: Name = "free"
    """Tier of tenants for whom nothing names one, or names one that does not exist."""
    isolate_prefixes: bool = True
    """Prompts of one tenant count as cached only for that tenant. Where caches are known by KV events and a tokenizer, what engines share counts: see `send_cache_salt`."""
    send_cache_salt: bool = False
    """Also have the engines keep their caches apart: `cache_salt` is added to requests for chats, completions and responses. Shared system prompts are then computed once for each tenant."""
    tiers: dict[Name, Tier] = TIERS
    """Tiers by name. Those here are added to `free` (10 requests a minute), `paid` (60) and `enterprise` (no limit), or take their places."""
    named: dict[str, Tenant] = {}
    """Tenants that differ from their tier, by name."""
    sharing: TenantSharing = TenantSharing()

    @property
    def limits_in_flight(self) -> bool:
        """Whether anybody has such a limit."""
        says: list[Tier] = [*self.tiers.values(), *self.named.values()]
        limits: list[Limits] = [*says, *(model for each in says for model in each.models.values())]
        return any(each.in_flight is not None for each in limits)

    @model_validator(mode="before")
    @classmethod
    def _default_tiers(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("tiers"), dict):
            return {**value, "tiers": {**TIERS, **value["tiers"]}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wanted = {"anonymous_tier": self.anonymous_tier, "default_tier": self.default_tier}
        wanted |= {f"named.{name}.tier": tenant.tier for name, tenant in self.named.items() if tenant.tier}
        for key, tier in wanted.items():
            if tier not in self.tiers:
                raise ValueError(f"{key}: there is no tier {tier!r}; known: {', '.join(self.tiers)}")
        if self.keys_file and not self.secret_file:
            raise ValueError("has keys_file without secret_file; the hashes in it need the secret they were made with")
        return self


class Inspect(Section):
    """What is kept to look at."""

    decisions: int = Field(default=1000, ge=0, le=100_000)
    """Decisions kept in memory for `/debug/decisions`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity of log lines."""


class Config(Section):
    """The whole file."""

    listen: Listen = Listen()
    pools: tuple[PoolConfig, ...] = Field(min_length=1)
    """Groups of replicas. A request goes to the pool that serves its model; one that names no model to the first pool."""
    models: tuple[ModelConfig, ...] = ()
    """Models by name, with rules, shares and fallbacks, where it takes more than what pools list. See docs/models.md."""
    providers: tuple[ProviderConfig, ...] = ()
    """APIs elsewhere that targets of `models` may name."""
    requests: Requests = Requests()
    envoy: EnvoyConfig = EnvoyConfig()
    shared: Shared | None = None
    """State shared with the other routers of the fleet; null for none. See docs/redis.md."""
    tenants: Tenants | None = None
    """Tenants and their limits; null for none: everybody is served alike. See docs/tenants.md."""
    inspect: Inspect = Inspect()
    shutdown_grace_s: float = Field(default=30.0, gt=0)
    """Seconds after SIGTERM in which held requests and open answers may finish. Give the orchestrator a few seconds more."""

    @property
    def knows_all(self) -> bool:
        """Whether nobody is served who is not known."""
        return self.tenants is not None and self.tenants.unknown == "refuse"

    @property
    def fails_open(self) -> bool:
        """Whether requests pass unrouted while extproc does not answer Envoy."""
        return not self.knows_all if self.envoy.fail_open is None else self.envoy.fail_open

    @property
    def undecided_pass(self) -> bool:
        """Whether a request passes unrouted that extproc could not decide on: after a mistake of its own, or at its end."""
        return self.fails_open and not self.knows_all

    @property
    def names_cluster(self) -> bool:
        """Whether answers to Envoy name the pool or provider: where there is more than one."""
        return len(self.pools) + len(self.providers) > 1

    @property
    def hold_limit_s(self) -> float:
        """Longest time for which a request may be kept: to be read, to have its turn, and some seconds for what surrounds that."""
        waits = (max(p.queue.max_wait_s, p.absent_wait_s) for p in self.pools if p.queue.enabled)
        return max(waits, default=0.0) + READING_LIMIT_S + 5.0

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if doubled := _doubled(p.name for p in self.pools):
            raise ValueError(f"pools: two are called {doubled!r}; rename one")
        if self.tenants is not None:
            _check_tenants(self.tenants, self.requests, self.shared)
        if doubled := _doubled(m for p in self.pools for m in set(p.models)):
            raise ValueError(f"pools: model {doubled!r} is in two pools; name it in one")
        if doubled := _doubled(r.address for p in self.pools for r in p.replicas):
            raise ValueError(f"pools: replica {doubled} is in two pools; list it in one")
        waits, answer_s = [p for p in self.pools if p.tokenizer], self.envoy.message_timeout_s
        if late := next((p for p in waits if p.tokenizer and p.tokenizer.timeout_s >= answer_s), None):
            raise ValueError(
                f"pools: {late.name!r} has a tokenizer.timeout_s that is not below envoy.message_timeout_s, {answer_s:g}; the proxy would give up first"
            )
        interval, ttl = self.envoy.progress_interval_s, self.requests.flight_ttl_s
        if interval is None and ttl < 600:
            raise ValueError(
                f"requests.flight_ttl_s: {ttl:g} would lose long generations while envoy.progress_interval_s is null; set 600 or more"
            )
        if interval is not None and ttl < 3 * interval:
            raise ValueError(
                f"requests.flight_ttl_s: {ttl:g} is less than three envoy.progress_interval_s; set {3 * interval:g} or more"
            )
        tiers = None if self.tenants is None else tuple(self.tenants.tiers)
        knows_tenants = self.tenants is not None or self.requests.tenant_header is not None
        config_models.check(self.models, self.providers, tuple(p.name for p in self.pools), tiers, knows_tenants)
        if self.tenants is not None:
            config_models.check_limits(self.models, _limited(self.tenants))
        aimed_at = {target.pool for model in self.models for target in (*model.targets, *model.fallback)}
        if len(self.pools) > 1 and (bare := [p.name for p in self.pools if not p.models and p.name not in aimed_at]):
            otherwise = ", or to be a target of models" if self.models else ""
            raise ValueError(
                f"pools: {bare[0]!r} names no models; with several pools each needs models: [...]{otherwise}"
            )
        return self


def _limited(tenants: Tenants) -> Iterator[tuple[str, Iterable[str]]]:
    """Where models have limits: dotted path, and their names."""
    yield from ((f"tenants.tiers.{name}.models", tier.models) for name, tier in tenants.tiers.items())
    yield from ((f"tenants.named.{name}.models", tenant.models) for name, tenant in tenants.named.items())


def _check_tenants(tenants: Tenants, requests: Requests, shared: Shared | None) -> None:
    """Raises ValueError where the section does not fit the others."""
    told = tenants.keys_file or tenants.jwt or requests.tenant_header
    if not told and tenants.unknown == "refuse":
        raise ValueError(
            "tenants: nothing tells who asks, so all would be refused; add keys_file, jwt or requests.tenant_header, or set unknown: anonymous"
        )
    if shared is not None and not tenants.secret_file:
        raise ValueError(
            "tenants: has no secret_file, so that routers that share would not know the same tenants; add one"
        )


def _doubled(values: Any) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return str(value)
        seen.add(value)
    return None


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: Path) -> Config:
    """Read and validate a configuration file.

    Relative paths in it are taken from the directory of the file. Raises ConfigError with one line for each mistake.
    """
    try:
        text = path.read_text()
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; pass --config with the path of a YAML file") from None
    return parse(text, source=str(path), base=path.parent)


def parse(text: str, source: str = "config", base: Path = Path()) -> Config:
    """Validate YAML text. `source` is how errors name it; relative paths in it are taken from `base`."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}: not YAML: {yaml_mistake(e)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must be a mapping with the key pools; see docs/configuration.md")
    try:
        config = Config.model_validate(raw)
    except ValidationError as e:
        raise ConfigError("\n".join(f"{source}: {mistake}" for mistake in mistakes(e, Config))) from None
    _check_policies(config, source)
    return _absolute(_with_pool_labels(config), base)


def mistakes(error: ValidationError, root: type[Section]) -> list[str]:
    """What is wrong, one line each: dotted path below `root`, the mistake, the remedy. For every file and option that is a Section."""
    return list(dict.fromkeys(_line(each, root) for each in _causes(error.errors())))


def yaml_mistake(error: yaml.YAMLError) -> str:
    """Where the text stops being YAML, and why, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else " ".join(str(error).split())


def _check_policies(config: Config, source: str) -> None:
    for i, pool in enumerate(config.pools):
        try:
            create(pool.policy, pool.policy_options)
        except PolicyError as e:
            raise ConfigError(f"{source}: pools[{i}].policy: {e}") from None


def _causes(errors: Sequence[Any]) -> list[Any]:
    """Without the lists called too short only because an item in them is wrong."""
    places = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(p != error["loc"] and p[: len(error["loc"])] == error["loc"] for p in places)
    ]


def _line(error: Any, root: type[Section]) -> str:
    """One mistake: dotted path, what is wrong, what to do."""
    loc = [part for part in error["loc"] if part != "function-before"]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    text = re.sub(r"^Value error, ", "", error["msg"])
    if error["type"] == "extra_forbidden":
        return f"{where}: no such key{_suggestion(loc, root)}"
    text = text[0].lower() + text[1:]
    if error["type"] == "missing":
        text = "is missing; add it"
    elif error["type"] == "too_short":
        text = f"needs at least {error['ctx']['min_length']} item"
    elif not error["type"].startswith("value_error"):
        text += f", not {_shown(error['input'])}"
    return f"{where}: {text}" if where else text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _suggestion(loc: list[Any], root: type[Section]) -> str:
    """The keys that stand there, nearest first."""
    section: Any = root
    for part in loc[:-1]:
        if isinstance(part, str) and (field := getattr(section, "model_fields", {}).get(part)):
            section = _section_in(field.annotation)
    keys = list(getattr(section, "model_fields", {}))
    if near := difflib.get_close_matches(str(loc[-1]), keys, n=1):
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(keys)}" if keys else "; remove it"


def _section_in(annotation: Any) -> Any:
    """The Section class inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None


def _with_pool_labels(config: Config) -> Config:
    """Give each fixed replica its pool's labels."""
    pools = tuple(
        pool.model_copy(
            update={
                "replicas": tuple(r.model_copy(update={"labels": {**pool.labels, **r.labels}}) for r in pool.replicas)
            }
        )
        for pool in config.pools
    )
    return config.model_copy(update={"pools": pools})


def _absolute(config: Config, base: Path) -> Config:
    """Resolve relative paths against the directory of the file."""

    def absolute(path: Path) -> Path:
        return path if path.is_absolute() else (base / path).absolute()

    def placed(source: S | None) -> S | None:
        if source is None:
            return None
        paths = {n: absolute(v) for n in type(source).model_fields if isinstance(v := getattr(source, n), Path)}
        return source.model_copy(update=paths)

    def found(discovery: Discovery) -> Discovery:
        return discovery.model_copy(update={n: placed(getattr(discovery, n)) for n in Discovery.model_fields})

    def of_pool(pool: PoolConfig) -> PoolConfig:
        found_in = found(pool.discovery) if pool.discovery else None
        return pool.model_copy(update={"discovery": found_in, "tokenizer": placed(pool.tokenizer)})

    pools = tuple(map(of_pool, config.pools))
    envoy = config.envoy.model_copy(
        update={
            "endpoints_file": absolute(config.envoy.endpoints_file),
            "bootstrap_file": absolute(config.envoy.bootstrap_file),
            "access_log": absolute(config.envoy.access_log) if config.envoy.access_log else None,
        }
    )
    shared = placed(config.shared)
    if shared is not None:
        shared = shared.model_copy(update={"tls": placed(shared.tls)})
    providers = tuple(placed(provider) for provider in config.providers)
    tenants = placed(config.tenants)
    return config.model_copy(
        update={"pools": pools, "providers": providers, "envoy": envoy, "shared": shared, "tenants": tenants}
    )
