"""The router with a catalog: where requests go, what happens where a target cannot serve them, and what a reload does."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.account import Account, Rate
from extproc.core.admission.settings import QueueSettings
from extproc.core.catalog.providers import FAILURES
from extproc.core.catalog.settings import ProviderSettings, Sticky, Target, When
from extproc.core.observers import Quiet, Waited
from extproc.core.router import PoolSettings, Router
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.types import (
    Api,
    Decision,
    DrainAsked,
    End,
    Outcome,
    Probe,
    Probed,
    Refusal,
    Reject,
    Remove,
    Replica,
    Request,
    Reset,
    Route,
    Serves,
    Turn,
    Wait,
)
from tests.core.catalog.support import at, catalog, chat, model, placed, pools, target, went
from tests.core.support import Log, ok, text, usage

HELD = QueueSettings(max_wait_s=5.0, absent_wait_s=3.0)
CLOUD = ProviderSettings("cloud", prompt_dollars=1.0)


def refused(made: Router, wanted: Request, now: float = 0.0) -> Refusal:
    verdict = made.arrive(wanted, now)
    assert isinstance(verdict, Reject), verdict
    made.check()
    return verdict.refusal


# --- names ------------------------------------------------------------------------------------------------------------


def test_an_alias_goes_where_the_model_goes_by_the_name_that_it_has_there() -> None:
    made = pools("a", "b", configured=catalog(model(target("b", engine="llama-8b"), aliases=("gpt-4o",))))
    for name in ("chat", "gpt-4o"):
        route = placed(made, chat(model=name))
        assert route.endpoints == (at("b"),)
        assert route.decision.model == "llama-8b"
        assert route.decision.target is not None
        assert route.decision.target.model == "chat"


def test_an_alias_finds_what_was_cached_under_another_name() -> None:
    made = pools("a", members=2, configured=catalog(model(target("a", engine="llama-8b"), aliases=("gpt-4o",))))
    made.learn(Serves("a", at("a"), ("llama-8b",)), 0.0)
    prompt = text(40_000)
    home = placed(made, chat(prompt)).endpoints[0]
    for name in ("gpt-4o", "llama-8b"):
        route = placed(made, chat(prompt, model=name), 60.0)
        assert route.endpoints[0] == home
        assert route.decision.prediction.cached_tokens > 9000
    assert placed(made, chat(prompt, model="llama-8b"), 60.0).decision.target is None, "named by a replica alone"


def test_a_name_that_nobody_has_is_not_found_and_those_that_there_are_are_told() -> None:
    log = Log()
    made = pools("a", configured=catalog(model(target("a"), aliases=("gpt-4o",))), observer=log)
    verdict = made.arrive(chat(model="nope"), 0.0)
    assert isinstance(verdict, Reject)
    assert (verdict.refusal, verdict.known_models) == (Refusal.MODEL_NOT_FOUND, ("chat", "gpt-4o"))
    assert log.rejects == [(verdict, None)]
    assert isinstance(made.explain(chat(model="nope"), 0.0), Reject)


def test_a_known_model_of_a_pool_without_replicas_is_absent() -> None:
    made = pools("a", configured=catalog(model(target("a"))))
    made.learn(Remove("a", at("a")), 0.0)
    assert refused(made, chat()) is Refusal.NO_REPLICAS


def test_what_replicas_list_goes_there_without_being_configured() -> None:
    made = pools("a", "b", configured=catalog(model(target("a"))))
    made.learn(Serves("b", at("b"), ("base", "adapter"), {"adapter": "base"}), 0.0)
    route = placed(made, chat(model="adapter"))
    assert (route.decision.pool, route.decision.model, route.decision.target) == ("b", "adapter", None)


def test_what_names_no_model_goes_to_the_first_pool() -> None:
    made = pools("a", "b", configured=catalog(model(target("b"))))
    assert placed(made, Request(api=Api.OTHER)).decision.pool == "a"


def test_without_a_catalog_nothing_is_aimed() -> None:
    made = pools("a")
    route = placed(made, chat(text(3000), model="anything"))
    assert (route.decision.model, route.decision.target) == ("anything", None)
    assert refused_model(PoolSettings("a", models=("x",))) is Refusal.UNKNOWN_MODEL


def refused_model(settings: PoolSettings) -> Refusal:
    return refused(Router([settings], Random(1)), chat(model="y"))


def test_of_thousands_of_names_a_refusal_tells_a_few() -> None:
    made = pools("a", configured=catalog(model(target("a"))))
    made.learn(Serves("a", at("a"), tuple(f"adapter-{i}" for i in range(3000))), 0.0)
    verdict = made.arrive(chat(model="nope"), 0.0)
    assert isinstance(verdict, Reject)
    assert len(verdict.known_models) == 20
    assert verdict.known_models[0] == "chat"


# --- the rule of docs/models.md -----------------------------------------------------------------------------------------


WORD = b"word "
"""1.3 tokens at the prior of 4 bytes each are 5.2 bytes a word; this has 5."""


@pytest.mark.parametrize(
    ("words", "quality", "to"),
    [(300, None, "s"), (384, None, "s"), (400, None, "l"), (300, "high", "l"), (2000, None, "l"), (300, "low", "s")],
)
def test_short_prompts_go_to_the_small_model_unless_high_quality_is_asked_for(
    words: int, quality: str | None, to: str
) -> None:
    """Estimate = words x 1.3; under 500 and not high quality to 8B, else 70B."""
    small = target("s", engine="llama-8b", when=When(prompt_tokens_below=500, quality_not=frozenset({"high"})))
    made = pools("s", "l", configured=catalog(model(small, target("l", engine="llama-70b"))))
    assert went(made, chat(WORD * words, quality=quality)) == to


def test_the_rule_follows_what_the_tokenizer_turns_out_to_be() -> None:
    small = target("s", when=When(prompt_tokens_below=500))
    made = pools("s", "l", configured=catalog(model(small, target("l"))))
    wanted = chat(WORD * 300)
    for _ in range(200):
        route = placed(made, chat(WORD * 100))
        made.finish(route.flight, ok(at("s"), usage=usage(250, 10)), 0.0)  # two bytes a token
    assert went(made, wanted) == "l"


# --- shares -----------------------------------------------------------------------------------------------------------


def test_a_session_stays_with_its_version_and_shares_come_out() -> None:
    made = pools("s", "c", configured=catalog(model(target("s", 95.0), target("c", 5.0))))
    got = {f"session {i}": went(made, chat(session=f"session {i}")) for i in range(2000)}
    assert 60 < Counter(got.values())["c"] < 145
    assert all(went(made, chat(session=name)) == to for name, to in list(got.items())[:100])


def test_the_rest_of_a_group_serves_where_one_has_nobody() -> None:
    made = pools("s", "c", configured=catalog(model(target("s", 95.0), target("c", 5.0))))
    made.learn(Remove("c", at("c")), 0.0)
    assert {went(made, chat(session=f"s{i}")) for i in range(200)} == {"s"}
    assert 0 < made.steering.spilled[("chat", "s", Refusal.NO_REPLICAS)] < 40


def test_who_falls_to_an_empty_version_waits_where_the_others_wait() -> None:
    made = pools("s", "c", configured=catalog(model(target("s", 95.0), target("c", 5.0))), queue=HELD)
    made.learn(Remove("c", at("c")), 0.0)
    made.learn(Probed("s", at("s"), Probe.LIVE, ok=False, refused=True), 0.0)
    assert all(isinstance(made.arrive(chat(session=f"s{i}"), 0.0), Wait) for i in range(100))
    assert len(made.pools["s"].admission) == 100
    assert 0 < made.steering.spilled.pop(("chat", "s", Refusal.NO_REPLICAS)) < 20
    assert not made.steering.spilled
    made.check()


# --- fallback on arrival ------------------------------------------------------------------------------------------------


def behind(*fallbacks: str, queue: QueueSettings = HELD, log: Log | None = None, **fields: object) -> Router:
    """Pool a, and these behind it."""
    names = ["a", *(name for name in fallbacks if name != "cloud")]
    of = model(target("a"), fallback=tuple(map(target, fallbacks)))
    return pools(*names, configured=catalog(of, providers=[CLOUD]), queue=queue, observer=log, **fields)  # type: ignore[arg-type]


def test_a_pool_whose_replicas_are_all_out_is_passed_over() -> None:
    made = behind("b")
    for _ in range(3):
        made.learn(Probed("a", at("a"), Probe.LIVE, ok=False), 0.0)
    assert went(made, chat(text(400))) == "b"
    assert made.steering.spilled == {("chat", "b", Refusal.ABSENT): 1}


def test_a_pool_that_drains_is_left() -> None:
    made = behind("b")
    made.learn(DrainAsked("a", at("a")), 0.0)
    assert went(made, chat(text(400))) == "b"


def test_where_nobody_can_it_waits_for_the_first() -> None:
    made = behind("b")
    for pool in "ab":
        made.learn(Probed(pool, at(pool), Probe.LIVE, ok=False, refused=True), 0.0)
    verdict = made.arrive(chat(text(400)), 0.0)
    assert isinstance(verdict, Wait)
    assert [len(made.pools[name].admission) for name in "ab"] == [1, 0]
    made.check()


def test_fallbacks_are_tried_in_their_order() -> None:
    made = behind("b", "cloud")
    made.learn(Remove("a", at("a")), 0.0)
    assert went(made, chat(text(400))) == "b"
    made.learn(Remove("b", at("b")), 0.0)
    assert went(made, chat(text(400))) == "cloud"


def test_where_nobody_is_anywhere_the_first_tells() -> None:
    made = behind("b")
    for pool in "ab":
        made.learn(Remove(pool, at(pool)), 0.0)
    assert refused(made, chat()) is Refusal.NO_REPLICAS


def test_who_finds_a_full_queue_does_not_wait_for_those_who_are_gone() -> None:
    made, _ = busy("b", queue=QueueSettings(max_requests=1))
    made.learn(Probed("b", at("b"), Probe.LIVE, ok=False, refused=True), 0.0)
    assert refused(made, chat(text(400_000, 77))) is Refusal.QUEUE_FULL


def test_a_first_provider_that_is_out_does_not_refuse_for_the_pool_behind_it() -> None:
    made = pools(
        "a", configured=catalog(model(target("cloud"), fallback=(target("a"),)), providers=[CLOUD]), queue=HELD
    )
    for _ in range(FAILURES):
        made.finish(placed(made, chat(text(400))).flight, Outcome(End.UNREACHABLE), 0.0)
    made.learn(Probed("a", at("a"), Probe.LIVE, ok=False, refused=True), 0.0)
    assert isinstance(made.arrive(chat(text(400)), 0.0), Wait)


def test_whoever_may_not_fall_back_is_refused() -> None:
    paid = target("b", when=When(tiers=frozenset({"paid"})))
    made = pools("a", "b", configured=catalog(model(target("a"), fallback=(paid,))))
    made.learn(Remove("a", at("a")), 0.0)
    assert refused(made, chat(tier="free")) is Refusal.NO_REPLICAS
    assert went(made, chat(tier="paid")) == "b"


def filled(made: Router, pool: str = "a") -> list[str]:
    """Requests that keep the pool's replica busy for seconds; the flights."""
    flights: list[str] = []
    while True:
        verdict = made.arrive(chat(text(200_000, len(flights)), model=f"direct-{pool}"), 0.0)
        if isinstance(verdict, Wait):
            return flights
        assert isinstance(verdict, Route)
        flights.append(verdict.flight)


def busy(*fallbacks: str, queue: QueueSettings = HELD, log: Log | None = None) -> tuple[Router, list[str]]:
    """Pool a with a queue, of which one request is held that the test did not send."""
    made = behind(*fallbacks, queue=queue, log=log)
    made.learn(Serves("a", at("a"), ("direct-a",)), 0.0)
    return made, filled(made)


def test_who_need_not_wait_long_waits() -> None:
    made, _ = busy("b")
    assert isinstance(made.arrive(chat(text(400)), 0.0), Wait)
    assert len(made.pools["a"].admission) == 2


def test_a_full_queue_is_passed_by() -> None:
    made, _ = busy("b", queue=QueueSettings(max_requests=1))
    assert went(made, chat(text(400_000, 77))) == "b"
    assert made.steering.spilled == {("chat", "b", Refusal.QUEUE_FULL): 1}


def test_who_would_wait_beyond_the_longest_wait_goes_elsewhere_at_once() -> None:
    made, _ = busy("b", queue=QueueSettings(max_wait_s=5.0, ageing=0.0))
    admission = made.pools["a"].admission
    admission.drain.sent(1000.0, 1.0)  # a thousand tokens in a second, and some fifty thousand wait
    assert went(made, chat(text(400_000, 77)), 1.0) == "b"
    assert made.steering.spilled == {("chat", "b", Refusal.DEADLINE): 1}
    assert isinstance(made.arrive(chat(text(400)), 1.0), Wait), "a short one goes before them"


def test_an_objective_that_cannot_be_met_here_may_be_elsewhere() -> None:
    made, _ = busy("b")
    assert went(made, chat(text(400), slo_ttft_s=1.0)) == "b"


# --- fallback after a wait -----------------------------------------------------------------------------------------------


def test_who_waited_in_vain_goes_to_the_fallback_instead_of_being_refused() -> None:
    log = Log()
    made, _ = busy("b", log=log)
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    turns = {turn.ticket: turn.verdict for turn in made.turns(wait.deadline)}
    verdict = turns[wait.ticket]
    assert isinstance(verdict, Route)
    assert verdict.endpoints == (at("b"),)
    assert verdict.decision.model == "engine-b"
    assert made.steering.spilled == {("chat", "b", Refusal.DEADLINE): 1}
    assert [reject.model for reject, _ in log.rejects] == ["direct-a"], "the other had nowhere to go"
    made.check()


def test_the_last_fallback_may_be_a_provider() -> None:
    made, _ = busy("cloud")
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    verdicts = [turn.verdict for turn in made.turns(wait.deadline) if turn.ticket == wait.ticket]
    assert [isinstance(v, Route) and v.decision.pool for v in verdicts] == ["cloud"]


def test_where_the_fallback_would_have_it_wait_too_it_is_refused() -> None:
    made = behind("b")
    for pool in "ab":
        made.learn(Serves(pool, at(pool), (f"direct-{pool}",)), 0.0)
        filled(made, pool)
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    verdicts = [turn.verdict for turn in made.turns(wait.deadline) if turn.ticket == wait.ticket]
    assert [v.refusal for v in verdicts if isinstance(v, Reject)] == [Refusal.DEADLINE]
    assert made.steering.spilled == {}
    made.check()


@pytest.mark.parametrize(("slo_ttft_s", "to"), [(5.5, None), (9.0, "cloud"), (None, "cloud")])
def test_of_the_time_that_the_client_gave_the_wait_is_gone(slo_ttft_s: float | None, to: str | None) -> None:
    """What is left is less than the half second that a provider takes, if the wait was."""
    made = behind("cloud", queue=QueueSettings(absent_wait_s=5.2))
    made.learn(Probed("a", at("a"), Probe.LIVE, ok=False, refused=True), 0.0)
    for _ in range(FAILURES):
        made.finish(placed(made, chat(text(400))).flight, Outcome(End.UNREACHABLE), 0.0)
    wait = made.arrive(chat(text(400), slo_ttft_s=slo_ttft_s), 0.0)  # the provider is out for 5 s
    assert isinstance(wait, Wait)
    verdicts = [turn.verdict for at_s in (0.0, 5.2) for turn in made.turns(at_s) if turn.ticket == wait.ticket]
    assert [v.decision.pool if isinstance(v, Route) else None for v in verdicts] == [to]


def test_a_tenant_is_counted_once_wherever_its_request_goes() -> None:
    account = Account("t", "free", requests=Rate(60.0, 10.0), tokens=Rate(1e6, 1e6))
    made, _ = busy("b")
    wait = made.arrive(chat(text(4000), account=account), 0.0)
    assert isinstance(wait, Wait)
    (route,) = [turn.verdict for turn in made.turns(wait.deadline) if turn.ticket == wait.ticket]
    assert isinstance(route, Route)
    assert route.allowance is not None
    assert route.allowance.requests is not None
    assert route.allowance.requests.remaining in (9, 10)
    made.check()
    made.finish(route.flight, ok(at("b")), 6.0)
    assert not made.limits.counted


class Waits(Quiet):
    """Keeps the ends of waits."""

    def __init__(self) -> None:
        self.ends: list[Waited] = []

    def waited(self, waited: Waited) -> None:
        self.ends.append(waited)


def test_the_end_of_a_wait_is_told_once_with_where_it_went() -> None:
    waits = Waits()
    made = behind("b")
    made._observer = waits
    made.learn(Serves("a", at("a"), ("direct-a",)), 0.0)
    filled(made)
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    made.turns(wait.deadline)
    (end,) = [w for w in waits.ends if w.held.ticket == wait.ticket]
    assert isinstance(end.verdict, Route)
    assert end.held.pool == "a"


def test_who_waits_for_a_pool_that_dies_goes_on_at_once() -> None:
    made, _ = busy("b")
    ours = [made.arrive(chat(text(4000, i)), 0.0) for i in range(3)]
    assert all(isinstance(wait, Wait) for wait in ours)
    made.learn(Probed("a", at("a"), Probe.LIVE, ok=False, refused=True), 0.1)
    routes = [turn.verdict for turn in made.turns(0.1)]
    assert [route.endpoints for route in routes if isinstance(route, Route)] == [(at("b"),)] * len(routes)
    assert 0 < len(routes) <= 3
    assert made.holding == 4 - len(routes), (
        "who named the replica's own model waits for it, and who finds no room there"
    )
    made.check()


def test_who_waits_while_there_is_nobody_anywhere_goes_to_whoever_comes_first() -> None:
    made = behind("b")
    for pool in "ab":
        made.learn(Probed(pool, at(pool), Probe.LIVE, ok=False, refused=True), 0.0)
    wait = made.arrive(chat(text(400)), 0.0)
    assert isinstance(wait, Wait)
    assert made.turns(0.0) == []
    made.learn(Reset("b", (Replica(at("b", 5)),)), 0.5)
    (turn,) = made.turns(0.5)
    assert isinstance(turn.verdict, Route)
    assert (turn.ticket, turn.verdict.endpoints) == (wait.ticket, (at("b", 5),))


def test_who_may_not_leave_does_not_keep_others_who_wait() -> None:
    paid = target("b", when=When(tiers=frozenset({"paid"})))
    made = pools("a", "b", configured=catalog(model(target("a"), fallback=(paid,))), queue=HELD)
    for pool in "ab":
        made.learn(Probed(pool, at(pool), Probe.LIVE, ok=False, refused=True), 0.0)
    waits = [made.arrive(chat(text(400), tier=tier), 0.0) for tier in ("free", "paid")]
    assert made.turns(0.0) == []
    made.learn(Reset("b", (Replica(at("b", 5)),)), 0.5)
    assert [turn.ticket for turn in made.turns(0.5)] == [waits[1].ticket]  # type: ignore[union-attr]


def test_who_is_in_haste_does_not_keep_others_who_wait() -> None:
    """Of the time that the client gave 0.4 s are left, and a provider takes half a second."""
    made = behind("cloud", queue=QueueSettings(absent_wait_s=20.0))
    made.learn(Probed("a", at("a"), Probe.LIVE, ok=False, refused=True), 0.0)
    for _ in range(FAILURES):
        made.finish(placed(made, chat(text(400))).flight, Outcome(End.UNREACHABLE), 0.0)
    waits = [made.arrive(chat(text(400), slo_ttft_s=slo_s), 0.0) for slo_s in (5.5, None)]
    assert made.turns(0.0) == []
    assert [turn.ticket for turn in made.turns(5.1)] == [waits[1].ticket]  # type: ignore[union-attr]


def test_who_waits_is_not_sent_to_replicas_that_are_out_while_there_is_another_way() -> None:
    made, flights = busy("b")
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    made.learn(DrainAsked("a", at("a")), 0.1)
    for flight in flights:
        made.finish(flight, ok(at("a"), ttft_s=0.1), 0.2)
    verdicts = {turn.ticket: turn.verdict for turn in made.turns(0.2)}
    verdict = verdicts[wait.ticket]
    assert isinstance(verdict, Route)
    assert verdict.endpoints == (at("b"),)
    assert Counter(v.endpoints[0] for v in verdicts.values() if isinstance(v, Route)) == {at("a"): 1, at("b"): 1}


def test_who_waits_behind_one_that_cannot_leave_a_draining_pool_goes_elsewhere() -> None:
    made, _ = busy("b")
    wait = made.arrive(chat(text(200_000, 99)), 0.0)
    assert isinstance(wait, Wait)
    made.learn(DrainAsked("a", at("a")), 0.1)
    verdicts = {turn.ticket: turn.verdict for turn in made.turns(0.1)}
    assert verdicts.keys() == {wait.ticket}, "the other named what only this pool has"
    verdict = verdicts[wait.ticket]
    assert isinstance(verdict, Route)
    assert verdict.endpoints == (at("b"),)


def test_who_still_waits_when_this_process_stops_goes_wherever_it_can() -> None:
    made = behind("b")
    for pool in "ab":
        made.learn(Probed(pool, at(pool), Probe.LIVE, ok=False, refused=True), 0.0)
    assert isinstance(made.arrive(chat(text(400)), 0.0), Wait)
    made.learn(Reset("b", ()), 1.0)
    made.learn(Reset("b", (Replica(at("b", 5)),)), 1.0)
    (turn,) = made.release(1.0)
    assert isinstance(turn.verdict, Route)
    assert turn.verdict.endpoints == (at("b", 5),)


# --- from zero ----------------------------------------------------------------------------------------------------------


def test_a_pool_that_starts_from_nothing_is_waited_for_only_without_another_way() -> None:
    scaling = ScalingSettings(min_replicas=0)
    made = behind("b", scaling=scaling)
    made.learn(Remove("a", at("a")), 0.0)
    assert went(made, chat(text(400)), 1.0) == "b"
    pool = made.pools["a"]
    assert pool.scaling is not None
    assert pool.scaling.active(pool.admission, pool.fleet, 1.0), "yet it is asked to start"


# --- reload --------------------------------------------------------------------------------------------------------------


def test_blue_goes_green_and_back_and_nobody_is_lost() -> None:
    blue, green = catalog(model(target("b"))), catalog(model(target("g")))
    made = pools("b", "g", configured=blue)
    before = placed(made, chat())
    made.learn(green, 1.0)
    after = placed(made, chat(), 1.0)
    assert [r.decision.pool for r in (before, after)] == ["b", "g"]
    for route in (before, after):
        made.finish(route.flight, ok(route.endpoints[0]), 2.0)
    made.learn(blue, 3.0)
    assert went(made, chat(), 3.0) == "b"
    assert made.in_flight == 0


def test_who_waits_through_a_reload_goes_where_it_waits() -> None:
    made, flights = busy("b")
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    made.learn(catalog(model(target("b"))), 0.5)
    for flight in flights:
        made.finish(flight, ok(at("a"), ttft_s=0.1), 1.0)
    verdicts = [turn.verdict for turn in made.turns(1.0) if turn.ticket == wait.ticket]
    assert [isinstance(v, Route) and v.endpoints for v in verdicts] == [(at("a"),)]


@pytest.mark.parametrize("blue", [[target("a", 0.0)], []], ids=["no weight", "gone"])
def test_who_waits_for_the_old_version_when_it_dies_goes_to_the_new_one(blue: list[Target]) -> None:
    made = pools("a", "b", configured=catalog(model(target("a"), target("b", 0.0))), queue=HELD)
    made.learn(Serves("a", at("a"), ("direct-a",)), 0.0)
    filled(made)
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    made.learn(catalog(model(*blue, target("b"))), 0.1)
    made.learn(Probed("a", at("a"), Probe.LIVE, ok=False, refused=True), 0.2)
    verdicts = [turn.verdict for turn in made.turns(0.2) if turn.ticket == wait.ticket]
    assert [isinstance(v, Route) and v.endpoints for v in verdicts] == [(at("b"),)]


def test_who_waits_in_vain_for_what_is_no_longer_configured_is_refused() -> None:
    made, _ = busy("b")
    wait = made.arrive(chat(text(4000)), 0.0)
    assert isinstance(wait, Wait)
    made.learn(catalog(), 0.5)
    verdicts = [turn.verdict for turn in made.turns(wait.deadline) if turn.ticket == wait.ticket]
    assert [v.refusal for v in verdicts if isinstance(v, Reject)] == [Refusal.DEADLINE]


# --- the list ------------------------------------------------------------------------------------------------------------


def listed(made: Router, **who: object) -> list[str]:
    return [each.name for each in made.listed(Request(**who), 0.0)]  # type: ignore[arg-type]


def test_the_list_has_names_aliases_what_replicas_list_and_parents() -> None:
    made = pools("a", "b", configured=catalog(model(target("a"), aliases=("gpt-4o",))))
    made.learn(Serves("b", at("b"), ("base", "adapter", "chat"), {"adapter": "base"}), 0.0)
    assert [(m.name, m.root, m.parent) for m in made.listed(Request(), 0.0)] == [
        ("chat", "chat", None),
        ("gpt-4o", "chat", None),
        ("base", "base", None),
        ("adapter", "adapter", "base"),
    ]


def test_what_two_pools_have_is_listed_once() -> None:
    made = pools("a", "b", configured=catalog(model(target("a"))))
    for pool in "ab":
        made.learn(Serves(pool, at(pool), ("base",)), 0.0)
    assert listed(made) == ["chat", "base"]


def test_what_starts_when_somebody_asks_is_listed() -> None:
    made = pools("a", configured=catalog(model(target("a"))), scaling=ScalingSettings(min_replicas=0), queue=HELD)
    made.learn(Remove("a", at("a")), 0.0)
    assert listed(made) == ["chat"]


def test_only_what_somebody_is_there_to_serve_is_listed() -> None:
    made = pools("a", "b", configured=catalog(model(target("a")), model(target("b", model="code"), name="code")))
    made.learn(Remove("b", at("b")), 0.0)
    assert listed(made) == ["chat"]
    made.learn(Probed("a", at("a"), Probe.LIVE, ok=False, refused=True), 0.0)
    assert listed(made) == []


def test_a_fallback_or_a_provider_is_somebody() -> None:
    made = behind("cloud")
    made.learn(Remove("a", at("a")), 0.0)
    assert listed(made) == ["chat"]


def test_what_a_client_may_not_have_is_not_listed() -> None:
    only = catalog(model(target("a", when=When(tiers=frozenset({"paid"})))))
    made = pools("a", configured=only)
    assert listed(made, tier="free") == []
    assert listed(made, tier="paid") == ["chat"]
    assert refused(made, chat(tier="free")) is Refusal.MODEL_NOT_FOUND


def test_a_model_whose_weight_is_all_with_nobody_is_not_listed() -> None:
    made = pools("a", "b", configured=catalog(model(target("a"), target("b", 0.0))))
    made.learn(Remove("a", at("a")), 0.0)
    assert listed(made) == []
    assert refused(made, chat()) is Refusal.NO_REPLICAS


@pytest.mark.parametrize(
    ("name", "free"),
    [("engine-a", False), ("adapter", False), ("engine-b", True), (None, False)],
)
def test_a_rule_on_who_asks_holds_under_the_names_of_replicas_too(name: str | None, free: bool) -> None:
    """Else whoever knows what the engine calls a model, or has no name for it, would have it in spite of the rule."""
    paid = When(tiers=frozenset({"paid"}))
    made = pools(
        "a", "b", configured=catalog(model(target("a", when=paid)), model(target("b", model="all"), name="all"))
    )
    made.learn(Serves("a", at("a"), ("engine-a", "adapter"), {"adapter": "engine-a"}), 0.0)
    made.learn(Serves("b", at("b"), ("engine-b",)), 0.0)
    assert isinstance(made.arrive(chat(model=name, tier="paid"), 0.0), Route)
    if free:
        assert isinstance(made.arrive(chat(model=name, tier="free"), 0.0), Route)
    else:
        assert refused(made, chat(model=name, tier="free")) is Refusal.MODEL_NOT_FOUND
    if name is not None:
        assert (name in listed(made, tier="free")) is free
        assert name in listed(made, tier="paid")


def test_what_one_model_keeps_another_may_give_under_the_name_of_its_own_target() -> None:
    paid = When(tiers=frozenset({"paid"}))
    base, adapter = target("a", when=paid), target("a", model="tuned", engine="adapter")
    made = pools("a", configured=catalog(model(base), model(adapter, name="tuned")))
    made.learn(Serves("a", at("a"), ("engine-a", "adapter"), {"adapter": "engine-a"}), 0.0)
    assert went(made, chat(model="adapter", tier="free")) == "a"
    assert refused(made, chat(model="engine-a", tier="free")) is Refusal.MODEL_NOT_FOUND


# --- always --------------------------------------------------------------------------------------------------------------


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "end", "fail", "gone", "back", "drain", "reload", "turn", "sweep"]),
        st.integers(0, 50),
    ),
    max_size=60,
)


@given(EVENTS)
def test_every_request_ends_once_whatever_happens_to_its_targets(events: list[tuple[str, int]]) -> None:
    """The ledger, the queues, the limits and the providers agree after each step, and nothing is left in the end."""
    shapes = [
        catalog(
            model(target("a", 2.0), target("b"), fallback=(target("cloud"),), sticky=Sticky.SESSION), providers=[CLOUD]
        ),
        catalog(model(target("cloud"), fallback=(target("a"),)), providers=[CLOUD]),
        catalog(model(target("a", 0.0), target("b"), fallback=(target("a"),))),
        catalog(),
    ]
    made = pools("a", "b", configured=shapes[0], queue=QueueSettings(max_requests=3, max_wait_s=4.0, absent_wait_s=2.0))
    account = Account("t", "free", requests=Rate(600.0, 100.0))
    now, asked, refusals = 0.0, 0, 0
    flights: list[str] = []
    waiting: set[str] = set()

    def turned(turns: list[Turn]) -> None:
        nonlocal refusals
        for turn in turns:
            waiting.discard(turn.ticket)
            if isinstance(turn.verdict, Route):
                flights.append(turn.verdict.flight)
            else:
                refusals += 1

    ended = 0
    for what, n in events:
        now += n / 10
        if what == "ask":
            asked += 1
            verdict = made.arrive(chat(text(n * 4000 + 1, n), session=f"s{n % 5}", account=account), now)
            if isinstance(verdict, Route):
                flights.append(verdict.flight)
            elif isinstance(verdict, Wait):
                waiting.add(verdict.ticket)
            else:
                refusals += 1
        elif what in ("end", "fail") and flights:
            flight = flights.pop(n % len(flights))
            outcome = ok(usage=usage(10, 5)) if what == "end" else Outcome(End.UPSTREAM_ERROR, status=500)
            made.finish(flight, outcome, now)
            ended += 1
        elif what == "gone":
            made.learn(Remove("ab"[n % 2], at("ab"[n % 2])), now)
        elif what == "drain":
            made.learn(DrainAsked("ab"[n % 2], at("ab"[n % 2])), now)
        elif what == "back":
            made.learn(Reset("ab"[n % 2], (Replica(at("ab"[n % 2])),)), now)
        elif what == "reload":
            made.learn(shapes[n % len(shapes)], now)
        elif what == "sweep":
            made.expire(now)
            open_now = {flight.id for flight in made.ledger}
            ended += sum(f not in open_now for f in flights)
            flights = [f for f in flights if f in open_now]
        turned(made.turns(now))
        made.check()
        assert made.in_flight == len(flights)
        assert made.holding == len(waiting)
        assert asked == len(flights) + len(waiting) + refusals + ended
    turned(made.release(now))
    for flight in flights:
        made.finish(flight, ok(), now)
    made.check()
    assert made.in_flight == made.holding == 0
    assert not made.limits.counted
    assert all(len(provider) == 0 for provider in made.steering.providers.values())


def test_what_is_explained_is_where_it_would_go() -> None:
    made = behind("b", "cloud")

    def explained() -> str:
        decision = made.explain(chat(text(400)), 0.0)
        return decision.pool if isinstance(decision, Decision) else decision.refusal.value

    assert explained() == "a"
    made.learn(DrainAsked("a", at("a")), 0.0)
    assert explained() == "b"
    made.learn(Remove("b", at("b")), 0.0)
    assert explained() == "cloud"
    assert made.steering.spilled == {}


def test_what_is_explained_changes_nothing_not_even_chance() -> None:
    one, other = (pools("a", "b", configured=catalog(model(target("a"), target("b")))) for _ in range(2))
    ways = []
    for i in range(50):
        assert isinstance(one.explain(chat(), float(i)), Decision)
        ways.append((went(one, chat(), float(i)), went(other, chat(), float(i))))
    assert all(a == b for a, b in ways)
    assert {a for a, _ in ways} == {"a", "b"}
