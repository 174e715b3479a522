"""The command line. Everything heavy is imported by the command that needs it, so that `extproc check` starts at once."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

import click

from extproc import __version__
from extproc.config import Config, ConfigError, Tenants, load

_CONFIG = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    default=Path("extproc.yaml"),
    show_default=True,
    help="Configuration file; docs/configuration.md has every key.",
)


_URL = "http://127.0.0.1:9003"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Send each LLM request to the replica where it costs least, from inside Envoy."""


def load_checked(path: Path) -> Config:
    """A valid configuration. Ends the program with what to mend otherwise."""
    try:
        return load(path)
    except ConfigError as e:
        raise click.ClickException(str(e)) from None


def collect_rarely() -> None:
    """Modules and generated messages stay for good, and a request leaves no cycles behind.

    With Python's thresholds the collector looked through all of the prefix index every 700 allocations, for a tenth of the CPU.
    Passes over the young are kept small, for each holds up the loop (10,000 objects take about 4 ms, 50,000 up to 20), and one
    over everything is left to accidents: it takes 0.2 s with a large decision log.
    """
    gc.freeze()
    gc.set_threshold(10_000, 5, 1000)


@main.command()
@_CONFIG
def serve(path: Path) -> None:
    """Serve Envoy's ext_proc, access log and health checks, and HTTP for inspection."""
    import uvloop

    from extproc.adapters.logs import Logs
    from extproc.app import App, StartError
    from extproc.envoy.endpoints import EndpointsError

    config = load_checked(path)
    logs = Logs()
    logs.start(config.inspect.log_level)
    collect_rarely()
    try:
        uvloop.run(App(config, path=path, logs=logs).run())
    except (ConfigError, StartError, EndpointsError) as e:
        raise click.ClickException(str(e)) from None
    finally:
        if not logs.stop():
            os._exit(1)  # standard error takes nothing, and the interpreter would wait for it for ever


@main.command()
@_CONFIG
def check(path: Path) -> None:
    """Validate a configuration; one line for each mistake, with its dotted path and a remedy."""
    from extproc.envoy import bootstrap

    config = load_checked(path)
    if mistakes := list(bootstrap.mistakes(config)):
        raise click.ClickException("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    replicas = sum(len(pool.replicas) for pool in config.pools)
    click.echo(f"{path}: good: {len(config.pools)} pool(s), {replicas} fixed replica(s)")


@main.command()
@_CONFIG
@click.option(
    "--baseline", type=click.Choice(["round_robin", "least_request", "random"]), help="Without extproc, for comparison."
)
@click.option("--output", type=click.Path(path_type=Path), help="Instead of envoy.bootstrap_file.")
@click.option("--no-validate", is_flag=True, help="Do not run `envoy --mode validate`.")
def envoy(path: Path, baseline: str | None, output: Path | None, no_validate: bool) -> None:
    """Render a complete Envoy bootstrap and let Envoy validate it."""
    from extproc.envoy import bootstrap, credentials
    from extproc.envoy.endpoints import EndpointsError, create_if_missing

    config = load_checked(path)
    try:
        create_if_missing(config)
        credentials.write(config)
        written = bootstrap.write(config, baseline=baseline, path=output)
        if not no_validate:
            bootstrap.validate(written)
    except (bootstrap.BootstrapError, EndpointsError, OSError) as e:
        raise click.ClickException(str(e)) from None
    click.echo(f"{written}: {'written' if no_validate else 'valid'}; run: envoy -c {written}")


@main.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="YAML list of replicas, instead of the options below."
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--model", default="llama-3.1-8b", show_default=True, help="Name it serves.")
@click.option("--gpu", default="h100", show_default=True, help="a100, h100 or h200: sets the step time.")
@click.option("--tp", default=1, show_default=True, help="Tensor parallelism.")
@click.option("--model-size", default="8b", show_default=True)
@click.option(
    "--time-scale", default=1.0, show_default=True, help="Above 1 the simulated GPU is slower by that factor."
)
@click.option("--kv-events", type=int, help="Publish KV events on this port, and replays on the next.")
def backend(path: Path | None, **options: Any) -> None:
    """Run simulated vLLM replicas: an OpenAI-compatible server with a step-by-step engine behind it, and no GPU."""
    import uvloop

    from extproc.sim.backend import serve
    from extproc.sim.spec import BackendSpec, load_specs

    try:
        specs = load_specs(path) if path else [BackendSpec.from_options(**options)]
        uvloop.run(serve(specs))
    except ConfigError as e:
        raise click.ClickException(str(e)) from None


@main.command()
@click.option(
    "--model-config", type=click.Path(path_type=Path), help="The model's config.json, instead of the four below."
)
@click.option("--layers", type=int)
@click.option("--heads", type=int, help="Of attention.")
@click.option("--kv-heads", type=int, help="Fewer with grouped queries.")
@click.option("--head-size", type=int)
@click.option("--parameters", type=float, required=True, help="Billions.")
@click.option("--weight-bytes", type=float, default=2.0, show_default=True, help="Of a parameter; FP8 has 1.")
@click.option("--kv-bytes", type=float, default=2.0, show_default=True, help="Of a number in the KV cache.")
@click.option("--tokens", type=int, default=4096, show_default=True, help="Prompt and output of a sequence.")
@click.option("--concurrent", type=int, default=32, show_default=True, help="Sequences at once on a replica.")
@click.option("--gpu-gb", type=float, default=80.0, show_default=True, help="Memory of a GPU.")
@click.option("--pipeline-parallel", type=int, default=1, show_default=True)
@click.option("--rate", type=float, help="Requests a second of all clients.")
@click.option("--rate-per-replica", type=float, help="Of one replica.")
@click.option("--json", "as_json", is_flag=True, help="Figures by name.")
def capacity(model_config: Path | None, as_json: bool, **options: Any) -> None:
    """GPU memory of a model, GPUs of a replica, replicas for a load: by arithmetic."""
    from extproc.sim.capacity import Asked, Model, answer, checked, lines, load_model

    options["parameters_b"] = options.pop("parameters")
    of_model = {name: options.pop(name) for name in Model.model_fields}
    try:
        if model_config is not None:
            names = ("parameters_b", "weight_bytes", "kv_bytes")
            model = load_model(model_config, *(of_model[name] for name in names))
        else:
            model = checked(Model, of_model, "options")
        asked = checked(Asked, options, "options")
    except ConfigError as e:
        raise click.ClickException(str(e)) from None
    click.echo(json.dumps(answer(model, asked), indent=1) if as_json else "\n".join(lines(model, asked)))


@main.command()
@click.argument("body", type=click.File("rb"), default="-")
@click.option("--url", default=_URL, show_default=True, help="extproc's HTTP port.")
@click.option("--tenant", help="Whose it is, where there are tenants; else it is nobody's.")
@click.option("--tier", help="With --tenant: as its key or claims would name it.")
@click.option("--json", "as_json", is_flag=True, help="The record as it is.")
def explain(body: BinaryIO, url: str, tenant: str | None, tier: str | None, as_json: bool) -> None:
    """Show the decision that a request body (a file, or standard input) would get, with the cost on each replica.

    Nothing is sent to a replica and nothing is reserved.
    """
    from extproc.explain import table

    named = {key: value for key, value in (("tenant", tenant), ("tier", tier)) if value is not None}
    record = _posted(url, f"/debug/explain?{urllib.parse.urlencode(named)}", body.read())
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        table(record)


@main.command()
@click.argument("address")
@click.option("--within", type=click.FloatRange(min=0), help="It ends in so many seconds: a spot notice.")
@click.option("--undo", is_flag=True, help="Send requests there again.")
@click.option("--pool", help="Only in this pool.  [default: every pool that has it]")
@click.option("--url", default=_URL, show_default=True, help="extproc's HTTP port.")
def drain(address: str, within: float | None, undo: bool, pool: str | None, url: str) -> None:
    """Send nothing new to a replica (ip:port); what runs there may finish."""
    asked = {"replica": address, "pool": pool, "within_s": None if undo else within}
    query = urllib.parse.urlencode({key: value for key, value in asked.items() if value is not None})
    for told in _posted(url, f"/replicas/{'undrain' if undo else 'drain'}?{query}"):
        click.echo(f"{told['replica']} of pool {told['pool']}: {told['state']}, {told['in_flight']} in flight")


@main.group()
def key() -> None:
    """API keys of tenants: write entries of the file named by `tenants.keys_file`."""


@key.command("add")
@_CONFIG
@click.argument("tenant")
@click.option("--tier", help="Instead of the tenant's own.")
@click.option("--stdin", is_flag=True, help="Read the key from standard input instead of making one.")
def key_add(path: Path, tenant: str, tier: str | None, stdin: bool) -> None:
    """Add a key for TENANT to the file and print it, once: only its hash is kept. A secret is made if there is none."""
    from extproc.adapters import keys

    tenants = _tenants(path)
    assert tenants.keys_file is not None
    assert tenants.secret_file is not None
    if tier is not None and tier not in tenants.tiers:
        raise click.ClickException(f"there is no tier {tier!r}; known: {', '.join(tenants.tiers)}")
    made = keys.new_key() if not stdin else _from_stdin()
    try:
        if not tenants.secret_file.exists() and not tenants.keys_file.exists():
            keys.create_secret(tenants.secret_file)
        keys.add(tenants.keys_file, keys.read_secret(tenants.secret_file), made, tenant, tier)
    except keys.KeyFileError as e:
        raise click.ClickException(str(e)) from None
    click.echo(f"{tenants.keys_file}: added a key for {tenant}", err=True)
    if not stdin:
        click.echo(made)


@key.command("hash")
@_CONFIG
def key_hash(path: Path) -> None:
    """Print the hash of a key read from standard input, as it stands in the file."""
    from extproc.adapters import keys

    tenants = _tenants(path)
    assert tenants.secret_file is not None
    try:
        click.echo(keys.hashed(tenants.secret_file, _from_stdin()))
    except keys.KeyFileError as e:
        raise click.ClickException(str(e)) from None


def _tenants(path: Path) -> Tenants:
    """The section, with both files named. Ends the program where it has not."""
    tenants = load_checked(path).tenants
    if tenants is None or tenants.keys_file is None:
        raise click.ClickException(f"{path}: tenants: names no keys_file; add keys_file: PATH and secret_file: PATH")
    return tenants


def _from_stdin() -> str:
    found = sys.stdin.readline().strip()
    if not found:
        raise click.ClickException("standard input has no key; write one line")
    return found


def _posted(url: str, path: str, body: bytes = b"") -> Any:
    """What extproc's HTTP port answers. Ends the program with the reason where it does not."""
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", data=body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as e:
        raise click.ClickException(f"{e.code}: {e.read(2000).decode(errors='replace')}") from None
    except OSError as e:
        raise click.ClickException(f"{url}: {e}; is `extproc serve` running, with listen.http there?") from None


@main.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help="Fleet and workload; deploy/demo.yaml when not given."
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("build/demo.json"), show_default=True)
def demo(path: Path | None, output: Path) -> None:
    """Simulated replicas, extproc and the real Envoy under load; then Envoy's own round robin; a table side by side."""
    from extproc.demo.children import DemoError
    from extproc.demo.compare import run_demo

    try:
        asyncio.run(run_demo(path, output))
    except (DemoError, ConfigError) as e:
        raise click.ClickException(str(e)) from None


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), help="Fleet; deploy/demo.yaml when not given.")
def run(path: Path | None) -> None:
    """The demo's fleet, extproc and Envoy, left running until Ctrl-C."""
    from extproc.demo.children import DemoError
    from extproc.demo.stack import run_stack

    try:
        asyncio.run(run_stack(path))
    except (DemoError, ConfigError) as e:
        raise click.ClickException(str(e)) from None


@main.command()
@click.option("--trace", type=click.Path(path_type=Path), help="A trace file; docs/simulator.md names public ones.")
@click.option(
    "--format", type=click.Choice(["mooncake", "agentic", "azure"]), help="Of the trace; its first line tells."
)
@click.option("--generate", help="Make a trace instead: sessions=500,sessions_per_s=5,... or empty for the defaults.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N requests.")
@click.option("--sessions", type=click.IntRange(1), help="Only the first N sessions of an agentic trace.")
@click.option("--sessions-per-s", type=float, default=0.1, show_default=True, help="How soon those follow each other.")
@click.option("--max-pause", type=float, help="Cut longer pauses between their turns, seconds.")
@click.option(
    "--speed-up",
    multiple=True,
    default=("1",),
    show_default=True,
    help="Arrivals come sooner by this factor. Several, as 1,1.5,2 or repeated: every policy runs at each.",
)
@click.option("--replica", multiple=True, help="gpu=h100,tp=1,count=8,... Repeatable.  [default: 8 H100]")
@click.option("--fleet", type=click.Path(path_type=Path), help="YAML file with the key fleet, as deploy/demo.yaml.")
@click.option("--model-size", help="Of the model served, like 8b or 70b.  [default: 8b]")
@click.option("--block-size", type=click.IntRange(1), help="KV block, tokens.  [default: the trace's]")
@click.option("--cpu-overhead", type=float, default=0.002, show_default=True, help="Seconds of CPU in each step.")
@click.option("--policy", multiple=True, help="NAME or NAME:OPTION=VALUE,... One run each. Repeatable.")
@click.option(
    "--routers", type=click.IntRange(1), default=1, show_default=True, help="Requests are dealt to them in turn."
)
@click.option(
    "--share/--no-share", default=False, show_default=True, help="Whether routers tell each other what they do."
)
@click.option(
    "--beat", type=float, default=0.5, show_default=True, help="Seconds between two words of a router on all it has."
)
@click.option("--beat-loss", type=click.FloatRange(0, 1), default=0.0, help="Share of them that come to nothing.")
@click.option("--events", type=click.FloatRange(0), help="Replicas tell of their KV caches, so many seconds late.")
@click.option(
    "--events-loss", type=click.FloatRange(0, 1), default=0.0, help="Share of what they tell that never comes."
)
@click.option("--router-dies", multiple=True, help="T:ROUTER, seconds and its place from 1. Repeatable.")
@click.option("--scrape-interval", type=float, default=0.5, show_default=True, help="Seconds between samples.")
@click.option("--scrape-age", type=float, default=0.0, show_default=True, help="Seconds by which samples come late.")
@click.option("--log-flush", type=float, default=0.1, show_default=True, help="Seconds between access log flushes.")
@click.option("--completion-delay", type=float, default=0.0, show_default=True, help="Further delay of ends, seconds.")
@click.option("--progress-interval", type=float, default=1.0, show_default=True, help="Seconds; 0 for no such entries.")
@click.option(
    "--prior-error", type=float, default=1.0, show_default=True, help="Factor on the routers' first step times."
)
@click.option(
    "--estimate-error",
    type=float,
    default=0.0,
    show_default=True,
    help="Sigma of the error in prompt sizes (log-normal).",
)
@click.option("--queue/--no-queue", default=True, show_default=True, help="Hold what no replica can start soon.")
@click.option(
    "--event", multiple=True, help="T:replica:dies, drains, errors, hangs, joins or slows=FACTOR. Repeatable."
)
@click.option("--oracle-lengths", is_flag=True, help="max_tokens of each request is its true output length.")
@click.option("--priority", type=click.FloatRange(0, 1), default=0.0, help="Share of sessions with priority 1.")
@click.option("--flood", type=float, help="Two tenants, one of which sends so many times what the other does.")
@click.option("--ask-ttft", type=float, help="Seconds; clients want that TTFT or a refusal at once (x-slo-ttft-ms).")
@click.option("--slo-ttft", type=float, default=2.0, show_default=True, help="Seconds, for goodput.")
@click.option("--slo-tpot", type=float, default=0.025, show_default=True, help="Seconds, for goodput.")
@click.option("--seed", type=int, default=1, show_default=True, help="Same seed, same run.")
@click.option("--json", type=click.Path(path_type=Path), help="Write the summaries here.")
@click.option("--log", type=click.Path(path_type=Path), help="Write each request here, a line of JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw curves here, as HTML or PNG by the name.")
def simulate(**options: Any) -> None:
    """Replay a trace on simulated replicas in virtual time, once for each policy, and compare."""
    from extproc.sim.simulate import SimulateError, from_options

    collect_rarely()
    try:
        from_options(**options)
    except SimulateError as e:
        raise click.ClickException(str(e)) from None
