"""A cluster in virtual time: clients, the proxy, routers and replicas, from a trace. No clock, no I/O, no asyncio.

The routers are `core.router.Router` itself, wired as in the service (`sim/sidecar.py`); the replicas are `sim/engine.py`. This
file is what stands between them:
 * a client sends its next turn `delay_s` after the answer to the one before, whether that was good, an error or a refusal;
 * a request that the router holds stays at the proxy until its turn; its client's clock runs on;
 * the proxy connects to the first of the router's list, and on a refused connection to the next; what breaks off after
   that has begun is lost, for the headers of a stream are out long before its first token;
 * the proxy tells the router how a request goes and how it ended, and counts it as timed out when no byte came for long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from extproc.config import EnvoyConfig
from extproc.core.types import (
    Api,
    Blocks,
    Decision,
    End,
    Outcome,
    PrefixSource,
    Progressed,
    Refusal,
    Reject,
    Request,
    Route,
    TokenBlocks,
    Usage,
    Wait,
)
from extproc.core.types import Turn as EndOfWait
from extproc.openai import errors
from extproc.sim.disaggregation import Link, Links
from extproc.sim.elastic import Elastic, Scaling
from extproc.sim.engine import EngineRequest, Token
from extproc.sim.incidents import Incident, Kind, newcomers
from extproc.sim.kv_events import CacheFact, Telling, token_blocks
from extproc.sim.node import Node, NodeSpec
from extproc.sim.sharing import Store
from extproc.sim.sidecar import MODEL, POOL, Sidecar, Wiring
from extproc.sim.timeline import Timeline
from extproc.sim.traces import Trace, Turn

BYTES_PER_TOKEN: Final = 4
RESPONSE_BYTES_PER_TOKEN: Final = 180
"""A streamed chunk of one token, frame included, as vLLM 0.32 sends it."""
IDLE_TIMEOUT_S: Final = EnvoyConfig().stream_idle_timeout_s
LOAD_INTERVAL_S: Final = 1.0
"""How often the load of the replicas is noted."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a run depends on but the policy."""

    trace: Trace
    fleet: tuple[NodeSpec, ...]
    routers: int = 1
    """Requests are dealt to them in turn. They talk where `wiring.sharing` says so."""
    router_deaths: tuple[tuple[float, int], ...] = ()
    """At what second the process of which router (from 1) ends. Its clients go to the others, who learn nothing of its flights."""
    wiring: Wiring = field(default_factory=Wiring)
    incidents: tuple[Incident, ...] = ()
    link: Link = field(default_factory=Link)
    """What KV caches travel over from a replica that computes a prompt for another; what the routers take it for is `wiring`'s."""
    scaling: Scaling | None = None
    """Who decides how many of the replicas there are; None where all are, from the start."""
    oracle_lengths: bool = False
    """Each request's `max_tokens` is its true output length."""
    slo_ttft_s: float | None = None
    """Every client wants its first token within so long or else a refusal at once (`x-slo-ttft-ms`); None where they wait."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Served:
    """One request as its client saw it; times are seconds from its arrival at the proxy, a wait there included."""

    turn: int
    """Its place in the trace."""
    arrived_s: float
    router: int
    replica: str | None
    """Who answered, or broke off; None when nobody was chosen."""
    attempts: int
    end: End | None
    """None when the router refused it, so that it never was on its way."""
    status: int
    reason: str
    """The policy's word for its choice."""
    queue_s: float | None
    """Until its prefill began; None when it never did."""
    ttft_s: float | None
    e2e_s: float
    prompt_tokens: int
    output_tokens: int
    """That came."""
    cached_tokens: int | None
    """Of the prompt, found in the replica's cache; None when it never answered."""
    predicted_cached_tokens: int | None
    predicted_ttft_s: float | None
    """From the moment at which its replica was chosen."""
    prefix_source: PrefixSource | None = None
    """What told of the predicted cached tokens."""
    held_s: float | None = None
    """How long it waited for that; None when it was not held."""
    refusal: Refusal | None = None
    priority: int = 0
    tenant: str | None = None


@dataclass(slots=True)
class _Call:
    """A request under way."""

    number: int
    turn: Turn
    arrived_s: float
    router: int
    waits: bool = False
    """It was held, or still is."""
    sent_s: float | None = None
    """When the router said where to, or that nowhere."""
    decision: Decision | None = None
    attempts: int = 0
    node: Node | None = None
    leg: Node | None = None
    """Another that computes its prompt now."""
    split: bool = False
    """Its prompt was, or is, computed by another replica."""
    scheduled_s: float | None = None
    first_token_s: float | None = None
    cached_tokens: int | None = None
    ended: bool = False

    @property
    def ttft_s(self) -> float | None:
        """As its client sees it."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def replica_ttft_s(self) -> float | None:
        """What of that the replica is responsible for."""
        return None if self.first_token_s is None or self.sent_s is None else self.first_token_s - self.sent_s

    @property
    def held_s(self) -> float | None:
        """How long the router held it."""
        return self.sent_s - self.arrived_s if self.waits and self.sent_s is not None else None


@dataclass(slots=True)
class Result:
    """What a run came to."""

    served: list[Served]
    nodes: tuple[Node, ...]
    sidecars: tuple[Sidecar, ...]
    lasted_s: float
    """Virtual time from the start to the last end."""
    elastic: Elastic | None = None
    """What became of the number of replicas, where somebody decided on it."""


class Cluster:
    """One run of a scenario with one policy. Call `run` once."""

    def __init__(
        self, scenario: Scenario, policy: str, options: Mapping[str, float | int | str | bool] | None = None
    ) -> None:
        self._scenario = scenario
        self._trace = trace = scenario.trace
        self._timeline = timeline = Timeline()
        events, blocks = scenario.wiring.events, {s.replica.address: s.engine.block_size for s in scenario.fleet}
        self._telling = (
            Telling(events, POOL, blocks, timeline, self._hear, scenario.seed) if events is not None else None
        )
        told = self._telling.tell if self._telling is not None else None
        self._nodes = {spec.replica.address: Node(spec, timeline, self, told) for spec in scenario.fleet}
        self._places = tuple(self._nodes.values())
        absent = newcomers(scenario.incidents)
        if scenario.scaling is not None:
            absent |= set(range(scenario.scaling.initial + 1, len(self._places) + 1))
        members = tuple(n.spec.replica for place, n in enumerate(self._places, 1) if place not in absent)
        for place in absent:
            self._places[place - 1].up = False
        sharing = scenario.wiring.sharing
        store = Store(POOL, sharing.expiry_s) if sharing is not None and scenario.routers > 1 else None
        wired = options or {}, scenario.wiring, timeline, scenario.seed, self._turned, store
        self._sidecars = tuple(Sidecar(i, self._nodes, members, policy, *wired) for i in range(scenario.routers))
        self._elastic = (
            Elastic(scenario.scaling, self._places, self._sidecars, timeline) if scenario.scaling is not None else None
        )
        sizes = {spec.engine.block_size for spec in scenario.fleet}
        if len(sizes) != 1 or trace.block_size % min(sizes):
            raise ValueError(f"block sizes {sorted(sizes)} of replicas; all need one that divides {trace.block_size}")
        self._ratio = trace.block_size // sizes.pop()
        self._ends = _ends(trace)
        self._calls: dict[int, _Call] = {}
        self._held: dict[tuple[int, str], _Call] = {}
        """By router and ticket."""
        self._served: list[Served] = []
        self._links = Links(scenario.link)
        self._next_of: dict[int, list[int]] = defaultdict(list)
        self._arrived = 0
        self._plan()

    def __repr__(self) -> str:
        done = f"{len(self._served)}/{len(self._trace.turns)} served"
        return f"<cluster at {self._timeline.now:.1f} s, {len(self._calls)} under way, {done}>"

    def _plan(self) -> None:
        starts = []
        for number, turn in enumerate(self._trace.turns):
            if turn.after is None:
                starts.append((turn.delay_s, number))
            else:
                self._next_of[turn.after].append(number)
        for at, number in sorted(starts):
            self._timeline.at(at, self._arrive, number)
        for incident in self._scenario.incidents:
            self._timeline.at(incident.at_s, self._befall, incident)
        for at, router in self._scenario.router_deaths:
            self._timeline.at(at, self._router_dies, router - 1)
        self._timeline.at(0.0, self._note_loads)

    def run(self, progress: Callable[[int], object] = int) -> Result:
        """Until every turn has ended. `progress` is told now and then how many have.

        Raises AssertionError if the books of routers or replicas do not balance at the end.
        """
        turns, told, timeline = len(self._trace.turns), 0, self._timeline
        while len(self._served) < turns:
            timeline.step()
            if len(self._served) >= told + 100:
                told = len(self._served)
                progress(told)
        lasted_s = timeline.now
        until = lasted_s + self._scenario.wiring.log_flush_interval_s + self._scenario.wiring.completion_delay_s + 1e-9
        while timeline.now <= until and any(s.router.in_flight for s in self._sidecars if s.alive):
            timeline.step()
        self._check()
        progress(turns)
        if self._elastic is not None:
            self._elastic.end(lasted_s)
        return Result(self._served, self._places, self._sidecars, lasted_s, self._elastic)

    @property
    def sidecars(self) -> tuple[Sidecar, ...]:
        """The routers, to be looked at."""
        return self._sidecars

    def until(self, seen: Callable[[float], bool]) -> float:
        """Go on until something is seen at the present second, which is returned, or to the last end. Instead of `run`."""
        while not seen(self._timeline.now) and len(self._served) < len(self._trace.turns):
            self._timeline.step()
        return self._timeline.now

    def _check(self) -> None:
        for node in self._places:
            node.check()
        for sidecar in self._sidecars:
            sidecar.router.check()
            if not sidecar.alive:
                continue
            assert sidecar.router.in_flight == 0, sidecar
            assert sidecar.router.holding == 0, sidecar
        assert sorted(s.turn for s in self._served) == list(range(len(self._trace.turns)))

    # --- the client ---------------------------------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        turn = self._trace.turns[number]
        call = self._calls[number] = _Call(number, turn, self._timeline.now, 0)
        self._ask(call)

    def _ask(self, call: _Call) -> None:
        """The proxy asks one of the routers that are there, each in its turn."""
        alive = [number for number, sidecar in enumerate(self._sidecars) if sidecar.alive]
        router = call.router = alive[self._arrived % len(alive)]
        self._arrived += 1
        sidecar = self._sidecars[router]
        verdict = sidecar.arrive(self._request(call.number, call.turn, call.turn.hashes()))
        if isinstance(verdict, Wait):
            call.waits = True
            self._held[router, verdict.ticket] = call
        else:
            self._judged(call, verdict)
        sidecar.ask_turns()

    def _turned(self, router: int, turn: EndOfWait) -> None:
        """A wait is over."""
        self._judged(self._held.pop((router, turn.ticket)), turn.verdict)

    def _judged(self, call: _Call, verdict: Route | Reject) -> None:
        call.sent_s = self._timeline.now
        if isinstance(verdict, Reject):
            self._end(call, None, errors.of_refusal(verdict).status, refusal=verdict.refusal)
            return
        call.decision = verdict.decision
        self._connect(call)

    def _request(self, number: int, turn: Turn, hashes: tuple[int, ...]) -> Request:
        known = min(len(hashes), turn.prompt_tokens // self._trace.block_size)
        ends, prompt_bytes = self._ends[:known], turn.prompt_tokens * BYTES_PER_TOKEN
        if self._scenario.wiring.estimate_error:
            factor = self._misjudged(number)
            ends, prompt_bytes = tuple(round(end * factor) for end in ends), max(round(prompt_bytes * factor), 1)
        tokenized = self._telling is not None
        return Request(
            api=Api.CHAT,
            model=turn.adapter or MODEL,
            blocks=Blocks(hashes[:known], ends),
            prompt_bytes=prompt_bytes,
            prompt_tokens=turn.prompt_tokens if tokenized else None,
            tokens=self._tokens(turn) if tokenized else None,
            max_output_tokens=turn.output_tokens if self._scenario.oracle_lengths else None,
            stream=True,
            session=turn.session,
            tenant=turn.tenant,
            priority=turn.priority,
            slo_ttft_s=self._scenario.slo_ttft_s,
            body_bytes=prompt_bytes,
        )

    def _tokens(self, turn: Turn) -> TokenBlocks:
        size = self._trace.block_size // self._ratio
        return token_blocks(turn.hashes(self._ratio)[: turn.prompt_tokens // size], size)

    def _misjudged(self, number: int) -> float:
        """By how much the prompt of a turn seems longer than it is; the same whatever the policy and the order of arrivals."""
        rng = Random(f"{self._scenario.seed}/estimate/{number}")
        return rng.lognormvariate(0.0, self._scenario.wiring.estimate_error)

    # --- the proxy ----------------------------------------------------------------------------------------------------

    def _connect(self, call: _Call) -> None:
        """To the first of the list that accepts the connection."""
        assert call.decision is not None
        for address in call.decision.endpoints:
            node = call.node = self._nodes[address]
            call.attempts += 1
            if node.up:
                self._send(call, node)
                return
        self._end(call, End.UNREACHABLE, 503)

    def _send(self, call: _Call, node: Node) -> None:
        turn = call.turn
        if node.failing:
            self._end(call, End.UPSTREAM_ERROR, 500)
            return
        assert call.decision is not None
        hashes = turn.hashes(self._ratio)
        request = EngineRequest(call.number, turn.prompt_tokens, turn.output_tokens, hashes, adapter=turn.adapter)
        if call.decision.prefiller is not None:
            node = call.leg = self._nodes[call.decision.prefiller]
            call.split, request = True, replace(request, output_tokens=1)
        if not self._submit(call, node, request):
            return
        if interval := self._scenario.wiring.progress_interval_s:
            self._timeline.at(self._timeline.now + interval, self._progress, call)

    def _submit(self, call: _Call, node: Node, request: EngineRequest) -> bool:
        """Whether the replica takes it."""
        if not node.up or node.failing:  # where a prompt is computed for another: whoever waits for it tells
            self._end(call, End.UPSTREAM_ERROR, 502)
            return False
        if node.submit(request):
            self._end(call, End.CLIENT_ERROR, 400)
            return False
        if node.hung:
            self._timeline.at(self._timeline.now + IDLE_TIMEOUT_S, self._time_out, call)
        return True

    def _computed(self, call: _Call, cached_tokens: int) -> None:
        """Its prompt was computed, and goes to the replica that answers."""
        assert call.leg is not None
        assert call.node is not None
        by, call.leg, call.cached_tokens = call.leg, None, cached_tokens
        turn = call.turn
        lacks = turn.prompt_tokens - call.node.cached_tokens(turn.hashes(self._ratio), turn.prompt_tokens)
        self._timeline.at(self._links.arrives_at(by.address, lacks, self._timeline.now), self._brought, call)

    def _brought(self, call: _Call) -> None:
        if call.ended:
            return
        turn = call.turn
        assert call.node is not None
        hashes = turn.hashes(self._ratio)
        self._submit(
            call,
            call.node,
            EngineRequest(
                call.number, turn.prompt_tokens, turn.output_tokens, hashes, turn.prompt_tokens, turn.adapter
            ),
        )

    def _progress(self, call: _Call) -> None:
        if call.ended or call.node is None or call.decision is None:
            return
        size = call.node.emitted(call.number) * RESPONSE_BYTES_PER_TOKEN
        entry = Progressed(call.decision.flight, call.ttft_s, call.replica_ttft_s, size)
        self._sidecars[call.router].log(entry)
        self._timeline.at(self._timeline.now + (self._scenario.wiring.progress_interval_s or 0), self._progress, call)

    def _time_out(self, call: _Call) -> None:
        if call.ended or call.node is None:
            return
        tokens = call.node.emitted(call.number)
        (call.leg or call.node).abort(call.number)
        self._end(call, End.TIMEOUT, 504 if call.first_token_s is None else 200, tokens)

    def _end(self, call: _Call, end: End | None, status: int, tokens: int = 0, refusal: Refusal | None = None) -> None:
        """The one end of a call: into the access log and the record; then its client thinks."""
        call.ended = True
        del self._calls[call.number]
        if call.decision is not None and end is not None:
            self._sidecars[call.router].log((call.decision.flight, self._outcome(call, end, status, tokens)))
        self._served.append(self._record(call, end, status, tokens, refusal))
        for number in self._next_of.pop(call.number, ()):
            self._timeline.at(self._timeline.now + self._trace.turns[number].delay_s, self._arrive, number)

    def _outcome(self, call: _Call, end: End, status: int, tokens: int) -> Outcome:
        told = end is End.OK  # usage stands at the end of a response: one that broke off has none
        return Outcome(
            end=end,
            status=status,
            served=call.node.address if call.node else None,
            attempts=max(call.attempts, 1),
            ttft_s=call.ttft_s,
            replica_ttft_s=call.replica_ttft_s,
            duration_s=self._timeline.now - call.arrived_s,
            response_bytes=tokens * RESPONSE_BYTES_PER_TOKEN,
            usage=Usage(call.turn.prompt_tokens, tokens, call.cached_tokens) if told else None,
        )

    def _record(self, call: _Call, end: End | None, status: int, tokens: int, refusal: Refusal | None) -> Served:
        decision = call.decision
        prediction = decision.prediction if decision else None
        return Served(
            turn=call.number,
            arrived_s=call.arrived_s,
            router=call.router,
            replica=call.node.address if call.node else None,
            attempts=call.attempts,
            end=end,
            status=status,
            reason=decision.reason if decision else "refused",
            queue_s=None if call.scheduled_s is None else call.scheduled_s - call.arrived_s,
            ttft_s=call.ttft_s,
            e2e_s=self._timeline.now - call.arrived_s,
            prompt_tokens=call.turn.prompt_tokens,
            output_tokens=tokens,
            cached_tokens=call.cached_tokens,
            predicted_cached_tokens=prediction.cached_tokens if prediction else None,
            predicted_ttft_s=prediction.ttft_s if prediction else None,
            prefix_source=decision.prefix_source if decision else None,
            held_s=call.held_s,
            refusal=refusal,
            priority=call.turn.priority,
            tenant=call.turn.tenant,
        )

    # --- what replicas tell -------------------------------------------------------------------------------------------

    def scheduled(self, request: int) -> None:
        """The prefill of a request begins, for the first time or, after a preemption, again."""
        call = self._calls[request]
        if call.scheduled_s is None:
            call.scheduled_s = self._timeline.now

    def token(self, token: Token) -> None:
        """The first or the last token of a request came."""
        assert isinstance(token.id, int)
        call = self._calls[token.id]
        if call.leg is not None:
            self._computed(call, token.cached_tokens)
            return
        if token.first:
            call.first_token_s = self._timeline.now
            call.cached_tokens = call.cached_tokens if call.split else token.cached_tokens
        if token.finished:
            self._end(call, End.OK, 200, token.position + 1)

    # --- what befalls them --------------------------------------------------------------------------------------------

    def _befall(self, incident: Incident) -> None:
        node = self._places[incident.replica - 1]
        match incident.kind:
            case Kind.DIES:
                self._break_off(node)
            case Kind.HANGS if node.up:
                for number in node.hang():
                    self._timeline.at(self._timeline.now + IDLE_TIMEOUT_S, self._time_out, self._calls[number])
            case Kind.SLOWS:
                node.slow(incident.factor)
            case Kind.ERRORS:
                node.failing = True
            case Kind.DRAINS:
                for sidecar in self._sidecars:
                    sidecar.drains(node.address)
            case Kind.JOINS:
                if node.up:
                    self._break_off(node)
                node.start()
                for sidecar in self._sidecars:
                    sidecar.joined(node.spec.replica)
            case _:
                return

    def _router_dies(self, router: int) -> None:
        """Those that it held are asked for again elsewhere; what it had sent off goes on by itself."""
        self._sidecars[router].die()
        for key in [key for key in self._held if key[0] == router]:
            self._ask(self._held.pop(key))

    def _break_off(self, node: Node) -> None:
        """What runs there is lost: its headers are out, so the proxy cannot send it elsewhere."""
        for number, tokens in node.die():
            self._end(self._calls[number], End.UPSTREAM_ERROR, 200, tokens)
        if self._telling is not None:
            self._telling.restarted(node.address)

    def _hear(self, fact: CacheFact) -> None:
        for sidecar in self._sidecars:
            sidecar.hear(fact)

    def _note_loads(self, _: object) -> None:
        for node in self._places:
            node.note_load()
        self._timeline.at(self._timeline.now + LOAD_INTERVAL_S, self._note_loads)


def _ends(trace: Trace) -> tuple[int, ...]:
    """Byte at which each block of the longest prompt ends."""
    longest = max((t.prompt_tokens for t in trace.turns), default=0) // trace.block_size
    return tuple((i + 1) * trace.block_size * BYTES_PER_TOKEN for i in range(longest))
