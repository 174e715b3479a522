"""LoRA adapters: who has one, what it costs where nobody has, and what is learned of it."""

from __future__ import annotations

import math
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.admission.admission import LOOK_AHEAD
from extproc.core.admission.settings import QueueSettings
from extproc.core.flights import Flight
from extproc.core.lora import FORGOTTEN_S, MOST, Held, LoadTime, Lora, Wanted
from extproc.core.router import Router
from extproc.core.settings import DisaggregationSettings, LoraSettings, PoolSettings
from extproc.core.types import (
    AdaptersSampled,
    Add,
    Configured,
    Decision,
    End,
    Outcome,
    Progressed,
    Refusal,
    Reject,
    Remove,
    Replica,
    Reset,
    Route,
    Sampled,
    Serves,
    Wait,
)
from extproc.core.types import Sample as Page
from tests.core.support import (
    MODEL,
    POOL,
    address,
    chosen,
    flight,
    member,
    ok,
    only,
    preferred,
    request,
    route,
    router,
    text,
)
from tests.core.test_disaggregation import apart

A, B, C, D = "adapter-a", "adapter-b", "adapter-c", "adapter-d"


def lists(made: Router, i: int, *adapters: str, now: float = 0.0) -> None:
    """The replica's answer of `/v1/models`."""
    made.learn(Serves(POOL, address(i), (MODEL, *adapters), dict.fromkeys(adapters, MODEL)), now)


def tells(made: Router, i: int, slots: int, *running: str, now: float = 0.0) -> None:
    """The replica's metrics."""
    page = Page(running=len(running), waiting=0, adapters=AdaptersSampled(slots, running))
    made.learn(Sampled(POOL, address(i), page), now)


def served(slots: int | None = None, replicas: int = 2, adapters: tuple[str, ...] = (A, B, C, D)) -> Router:
    """All replicas list these adapters, and tell so many slots."""
    made = router(replicas)
    for i in range(replicas):
        lists(made, i, *adapters)
        if slots is not None:
            tells(made, i, slots)
    return made


def finish(made: Router, made_route: str, now: float) -> None:
    made.finish(made_route, ok(), now)


class TestWhoCanServe:
    def test_only_those_that_list_it(self) -> None:
        made = router(3)
        lists(made, 0, A)
        lists(made, 1, A, B)
        lists(made, 2)
        for n in range(8):
            assert route(made, request(text(4000, n), model=B)).endpoints == (address(1),)
        assert set(route(made, request(model=A)).endpoints) == {address(0), address(1)}
        assert len(route(made, request()).endpoints) == 3

    def test_what_nobody_lists_as_an_adapter_may_go_anywhere(self) -> None:
        made = router(3)
        made.learn(Serves(POOL, address(0), (MODEL, A), {}), 0.0)
        assert len(route(made, request(model=A)).endpoints) == 3

    def test_others_may_have_it_and_say_no_more_than_its_name(self) -> None:
        """An engine of another kind in the pool, or the adapter merged into a model of its own."""
        made = router(3)
        lists(made, 0, A)
        made.learn(Serves(POOL, address(1), (MODEL, A), {}), 0.0)
        made.learn(Serves(POOL, address(2), (MODEL,), {}), 0.0)
        assert set(route(made, request(model=A)).endpoints) == {address(0), address(1)}

    def test_of_two_base_models_each_with_an_adapter_of_that_name(self) -> None:
        made = router(2)
        made.learn(Serves(POOL, address(0), ("one", A), {A: "one"}), 0.0)
        made.learn(Serves(POOL, address(1), ("other", A), {A: "other"}), 0.0)
        assert set(route(made, request(model=A)).endpoints) == {address(0), address(1)}
        made.learn(Serves(POOL, address(1), ("other",), {}), 1.0)
        assert route(made, request(model=A), 1.0).endpoints == (address(0),)

    def test_requests_that_wait_for_those_that_have_it_let_others_pass(self) -> None:
        made = router(2, queue=QueueSettings())
        lists(made, 0, A)
        lists(made, 1)
        waits = [made.arrive(request(text(60_000, n), model=A), 0.0) for n in range(3)]
        assert [type(each) for each in waits] == [Route, Wait, Wait]
        held = made.arrive(request(text(90_000)), 0.1)
        assert isinstance(held, Wait)
        (turn,) = made.turns(0.1)
        assert turn.ticket == held.ticket
        assert isinstance(turn.verdict, Route)
        assert turn.verdict.endpoints[0] == address(1)

    def test_so_do_those_for_an_adapter_that_only_others_have(self) -> None:
        made = router(2, queue=QueueSettings())
        made.pools[POOL].lora.load = LoadTime(0.05)
        lists(made, 0, A, C)
        lists(made, 1, D)
        route(made, request(text(90_000), model=A))
        assert isinstance(made.arrive(request(text(40, 1), model=C), 0.0), Wait)
        held = made.arrive(request(text(8000, 2), model=D), 0.0)
        assert isinstance(held, Wait)
        assert [turn.ticket for turn in made.turns(0.0)] == [held.ticket]

    def test_a_hint_that_leaves_none_of_them(self) -> None:
        made = router(2)
        lists(made, 0, A)
        assert made.arrive(request(model=A, subset=only(1)), 0.0) == Reject(Refusal.SUBSET_EMPTY, A)

    def test_a_list_that_changed(self) -> None:
        made = router(2)
        lists(made, 0, A)
        lists(made, 1)
        assert chosen(made, request(model=A)) == address(0)
        lists(made, 0)
        lists(made, 1, A)
        assert chosen(made, request(model=A)) == address(1)

    def test_the_last_that_had_it_left(self) -> None:
        made = router(2)
        lists(made, 0, A)
        lists(made, 1)
        made.learn(Remove(POOL, address(0)), 1.0)
        assert made.arrive(request(model=A), 1.0) == Reject(Refusal.UNKNOWN_MODEL, A, (MODEL,))

    def test_one_that_the_configuration_names_is_known_even_then(self) -> None:
        made = router(2)
        lists(made, 0, A)
        lists(made, 1)
        made.learn(Configured(POOL, PoolSettings(POOL, models=(MODEL, A), scraped=False)), 1.0)
        made.learn(Remove(POOL, address(0)), 1.0)
        assert made.arrive(request(model=A), 1.0) == Reject(Refusal.NO_REPLICAS, A)
        assert chosen(made, request(), 1.0) == address(1)
        lists(made, 1, A, now=2.0)
        assert chosen(made, request(model=A), 2.0) == address(1)

    def test_one_that_left_and_came_back_says_anew_what_it_has(self) -> None:
        made = router(2)
        lists(made, 0, A)
        lists(made, 1, A)
        made.learn(Remove(POOL, address(0)), 1.0)
        made.learn(Add(POOL, Replica(address(0))), 2.0)
        assert route(made, request(model=A), 2.0).endpoints == (address(1),)

    def test_a_new_replica_says_first_what_it_has(self) -> None:
        made = router(1)
        lists(made, 0, A)
        made.learn(Add(POOL, Replica(address(1))), 1.0)
        assert route(made, request(model=A), 1.0).endpoints == (address(0),)
        lists(made, 1, A, now=2.0)
        assert len(route(made, request(model=A), 2.0).endpoints) == 2

    @given(
        st.lists(
            st.tuples(
                st.integers(0, 2),
                st.lists(st.sampled_from("ABCD"), unique=True),
                st.sets(st.sampled_from(["", *"ABCD"])),
            )
        )
    )
    def test_changes_one_by_one_come_to_what_all_lists_together_say(
        self, changes: list[tuple[int, list[str], set[str]]]
    ) -> None:
        lora, now = Lora(LoraSettings()), dict[str, tuple[list[str], set[str]]]()
        for i, models, parents in changes:
            lora.lists(address(i), models, parents)
            now[address(i)] = models, parents & {*models}
            lists_ = {m: {a for a, (has, _) in now.items() if m in has} for has, _ in now.values() for m in has}
            assert lora.models == lists_
            assert lora.holders == {name: lists_[name] for _, called in now.values() for name in called}

    def test_an_adapter_that_became_a_model_of_its_own(self) -> None:
        lora = Lora(LoraSettings())
        lora.lists(address(0), (A,), {A})
        lora.lists(address(1), (A,), ())
        lora.lists(address(0), (), (), configured=(A,))
        assert lora.holders == {A: {address(1)}}


class TestWhereItIsHeld:
    def test_requests_go_back_to_where_it_was_loaded(self) -> None:
        made = served(slots=1)
        first = route(made, request(text(2000, 1), model=A))
        finish(made, first.flight, 1.0)
        for n in range(2, 10):
            at = route(made, request(text(2000, n), model=A), float(n))
            assert at.endpoints[0] == first.endpoints[0]
            assert at.decision.prediction.load_s == 0.0
            finish(made, at.flight, n + 0.5)

    def test_it_counts_at_once_and_not_with_the_next_sample(self) -> None:
        made = served()
        at = chosen(made, request(text(400, 1), model=A))
        assert chosen(made, request(text(400, 2), model=A), 0.001) == at

    def test_a_load_is_part_of_the_prefill_and_of_the_cost(self) -> None:
        made = served()
        before = made.explain(request(text(400)), 0.0)
        after = made.explain(request(text(400), model=A), 0.0)
        assert isinstance(before, Decision)
        assert isinstance(after, Decision)
        assert before.prediction.load_s is None
        assert after.prediction.load_s == LoraSettings().load_s
        assert after.prediction.prefill_s == pytest.approx(before.prediction.prefill_s + LoraSettings().load_s)
        assert after.prediction.cost_s >= before.prediction.cost_s + LoraSettings().load_s
        assert after.candidates[0].terms["load_s"] == LoraSettings().load_s
        assert "load_s" not in before.candidates[0].terms

    def test_a_long_queue_is_worse_than_a_load(self) -> None:
        made = served()
        at = chosen(made, request(text(400, 1), model=A))
        for n in range(6):
            route(made, request(text(80_000, 10 + n), subset=frozenset({at})))
        assert preferred(made, request(text(400, 2), model=A)) != at

    def test_what_runs_there_by_its_own_word_is_held(self) -> None:
        made = served(slots=2)
        tells(made, 1, 2, A)
        assert preferred(made, request(text(400), model=A)) == address(1)

    def test_one_that_has_not_told_its_slots_has_as_many_as_another(self) -> None:
        """It tells with its first step: until then all adapters would go there, for it seemed to have room for any."""
        made = served(slots=None, replicas=2)
        tells(made, 0, 1, C)
        tells(made, 0, 1)
        first = chosen(made, request(model=A), 1.0)
        second = chosen(made, request(model=B), 1.5)
        assert (first, second) == (address(1), address(0))

    def test_where_the_configuration_says_how_many_others_do_not_count(self) -> None:
        made = served(slots=None, replicas=2)
        made.learn(Configured(POOL, PoolSettings(POOL, scraped=False, lora=LoraSettings(slots=4))), 0.0)
        tells(made, 0, 1)
        for n, name in enumerate((A, B, C)):
            finish(made, route(made, request(model=name, subset=only(1)), n).flight, n + 0.5)
        assert preferred(made, request(model=A), 4.0) == address(1)

    def test_what_a_replica_did_not_load_is_not_believed_to_be_there(self) -> None:
        made = served(slots=2)
        sent = route(made, request(model=A))
        made.finish(sent.flight, Outcome(End.CLIENT_ERROR, status=400), 0.1)
        again = made.explain(request(model=A, subset=frozenset({sent.endpoints[0]})), 0.2)
        assert isinstance(again, Decision)
        assert again.prediction.load_s

    def test_a_client_that_is_at_fault_does_not_make_it_forgotten(self) -> None:
        made = served(slots=2)
        finish(made, route(made, request(model=A)).flight, 0.1)
        sent = route(made, request(model=A), 0.2)
        assert sent.decision.prediction.load_s == 0.0
        made.finish(sent.flight, Outcome(End.CLIENT_ERROR, status=400), 0.3)
        assert preferred(made, request(text(400, 9), model=A), 0.4) == sent.endpoints[0]

    def test_one_that_says_that_it_has_none_such_keeps_no_requests(self) -> None:
        """It was unloaded there: believed to be held, it would draw every request for it, each to its 404."""
        made = served(slots=2)
        first = route(made, request(text(400, 1), model=A))
        finish(made, first.flight, 0.1)
        at, other = first.endpoints[:2]
        finish(made, route(made, request(text(400, 2), model=A, subset=frozenset({other})), 0.2).flight, 0.3)
        sent = route(made, request(text(400, 1), model=A, subset=frozenset({at})), 0.4)
        made.finish(sent.flight, Outcome(End.CLIENT_ERROR, status=404), 0.5)
        assert preferred(made, request(text(400, 1), model=A), 0.6) == other

    def test_others_that_use_it_there_go_on(self) -> None:
        made = served(slots=2)
        first, second = route(made, request(model=A)), route(made, request(model=A))
        made.finish(second.flight, Outcome(End.CLIENT_ERROR, status=404), 0.1)
        assert preferred(made, request(model=A), 0.2) == first.endpoints[0]
        made.check()

    def test_a_free_slot_is_taken_before_one_that_is_held(self) -> None:
        made = served(slots=1)
        first = route(made, request(model=A))
        finish(made, first.flight, 1.0)
        second = route(made, request(model=B), 2.0)
        finish(made, second.flight, 3.0)
        assert first.endpoints[0] != second.endpoints[0]

    def test_of_two_that_are_held_the_one_used_longer_ago_is_pushed_out(self) -> None:
        made = served(slots=1)
        for name, i, now in ((A, 0, 1.0), (B, 1, 20.0)):
            finish(made, route(made, request(model=name, subset=only(i)), now).flight, now + 1.0)
        assert preferred(made, request(model=C), 30.0) == address(0)

    def test_a_process_that_began_anew_holds_nothing(self) -> None:
        made = served(slots=1)
        made.learn(Sampled(POOL, address(0), Page(generated_tokens=5.0, adapters=AdaptersSampled(1, (A,)))), 1.0)
        assert preferred(made, request(model=A), 1.0) == address(0)
        made.learn(Sampled(POOL, address(0), Page(generated_tokens=0.0, adapters=AdaptersSampled(1))), 2.0)
        decision = made.explain(request(model=A), 2.0)
        assert isinstance(decision, Decision)
        assert decision.prediction.load_s

    def test_it_goes_along_with_a_request_that_the_proxy_sent_elsewhere(self) -> None:
        made = served(slots=1)
        sent = route(made, request(model=A))
        before, after = sent.endpoints[:2]
        made.learn(Progressed(sent.flight, None, None, 0, served=after), 0.1)
        made.check()
        held = member(made, after).load.lora
        assert held is not None
        assert held.expected(Wanted(A, 1.0, None), True, None, 0.2)[1] == 0.0
        left = member(made, before).load.lora
        assert left is not None
        assert left.names == ()
        finish(made, sent.flight, 1.0)
        made.check()
        assert before != after


class TestSlots:
    def test_all_taken_by_others_it_waits_for_one_to_end(self) -> None:
        made = served(slots=2, replicas=1)
        for name in (A, B):
            route(made, request(text(400), model=name, output=500))
        free = made.explain(request(text(400), model=A), 0.0)
        taken = made.explain(request(text(400), model=C), 0.0)
        assert isinstance(free, Decision)
        assert isinstance(taken, Decision)
        assert taken.prediction.queue_s > free.prediction.queue_s + 0.5

    def test_it_waits_less_the_longer_they_run(self) -> None:
        made = served(slots=1, replicas=1)
        route(made, request(text(400), model=A, output=500))
        waits = [made.explain(request(model=B), now) for now in (0.0, 1.0)]
        first, second = (each.prediction.queue_s for each in waits if isinstance(each, Decision))
        assert second == pytest.approx(first - 1.0, abs=0.6)
        assert second < first

    def test_the_second_in_line_waits_for_the_second_to_end(self) -> None:
        held = Held()
        held.sampled(AdaptersSampled(2), 0.0)
        for name, decode_s, waits_s in ((A, 3.0, 0.0), (B, 1.0, 0.0), (C, 1.0, 1.0)):
            held.opened(Wanted(name, 0.5, None), lasting(name, decode_s, queue_s=waits_s), 0.0)
        assert held.expected(Wanted(C, 0.5, None), True, None, 0.0) == (1.0, 0.0, 0.0)
        wait_s, load_s, again_s = held.expected(Wanted(D, 0.5, None), True, None, 0.0)
        assert (load_s, again_s) == (0.5, 0.5)
        assert wait_s == pytest.approx(2.0)  # when C has ended, which got its slot from B

    def test_what_it_runs_for_others_takes_slots_too(self) -> None:
        held = Held()
        held.sampled(AdaptersSampled(1, (A,)), 0.0)
        wanted = Wanted(B, 0.5, None)
        assert held.expected(wanted, True, 4.0, 0.0)[0] == 4.0
        assert held.expected(wanted, True, None, 0.0)[0] == 0.0  # nobody knows how long that takes
        assert held.expected(wanted, False, 4.0, 0.0)[0] == 0.0  # too old to count

    def test_ours_that_ended_since_the_sample_hold_no_slot(self) -> None:
        held = Held()
        ours = lasting(A, 9.0)
        held.opened(Wanted(A, 0.5, None), ours, 0.0)
        held.sampled(AdaptersSampled(1, (A,)), 0.1)
        assert held.expected(Wanted(B, 0.5, None), True, 9.0, 0.1)[0] > 8.0
        held.closed(Wanted(A, 0.5, None), ours, 0.2)
        assert held.expected(Wanted(B, 0.5, None), True, 9.0, 0.2)[0] == 0.0

    def test_what_is_in_use_is_not_pushed_out(self) -> None:
        held = Held()
        held.sampled(AdaptersSampled(2), 0.0)
        held.opened(Wanted(A, 0.5, None), lasting(A, 50.0), 0.0)
        for n, name in enumerate((B, C, D), 1):
            ours = lasting(name, 1.0)
            held.opened(Wanted(name, 0.5, None), ours, float(n))
            held.closed(Wanted(name, 0.5, None), ours, n + 0.5)
        assert held.expected(Wanted(C, 0.5, None), True, None, 4.0)[1] == 0.5  # A and D have the slots
        held.closed(Wanted(A, 0.5, None), lasting(A, 50.0), 9.0)
        loads = [held.expected(Wanted(name, 0.5, None), True, None, 9.0)[1] for name in (A, B, C, D)]
        assert loads == [0.0, 0.5, 0.5, 0.0]
        assert held.expected(Wanted(C, 0.5, None), True, None, 9.0)[2] == pytest.approx(
            0.5 * math.exp(-5.5 / FORGOTTEN_S)
        )

    def test_whoever_waits_for_a_slot_holds_up_nobody(self) -> None:
        made = served(slots=1, replicas=1)
        route(made, request(text(400, 1), model=A, output=500))
        waiting = route(made, request(text(400, 2), model=B, output=500))
        prediction = waiting.decision.prediction
        assert prediction.queue_s > 2 * prediction.prefill_s
        late = prediction.queue_s - 0.1
        made.learn(Progressed(waiting.flight, None, None, 0), late)
        assert member(made).load.backlog_s(late) == 0.0
        overdue = prediction.ttft_s + 1.0
        made.learn(Progressed(waiting.flight, None, None, 0), overdue)
        assert member(made).load.backlog_s(overdue) > 0.0

    def test_requests_that_wait_for_a_slot_do_not_make_the_replica_look_full(self) -> None:
        """With that, in a fleet short of slots, requests for the base model waited twelve times as long for their first token."""
        made = served(slots=1, replicas=1)
        where = member(made)
        where.latency_s = 5.0
        for n, name in enumerate((A, B, B)):
            route(made, request(text(400, n), model=name, output=500))
        page = Page(running=1, waiting=2, adapters=AdaptersSampled(1, (A,), (B,)))
        made.learn(Sampled(POOL, address(0), page), 1.5)  # their own prefills would be done by now
        assert where.awaiting_adapter(1.5) == 2
        base = made.explain(request(text(400)), 1.5)
        assert isinstance(base, Decision)
        assert base.prediction.queue_s < 0.5
        ask = made.pools[POOL].ask(request(text(400)), [where], 1.5)
        assert made.pools[POOL].admission.room.wait_s(ask, where, 1.5) < 0.5

    def test_unknown_slots_let_nobody_wait(self) -> None:
        held = Held()
        for name in (A, B, C):
            held.opened(Wanted(name, 0.5, None), lasting(name, 5.0), 0.0)
        assert held.expected(Wanted(D, 0.5, None), True, 1.0, 0.0) == (0.0, 0.5, 0.0)

    def test_the_configured_ones_count_where_it_does_not_tell(self) -> None:
        held = Held()
        for n, name in enumerate((A, B)):
            ours = lasting(name, 5.0)
            held.opened(Wanted(name, 0.5, None), ours, float(n))
            held.closed(Wanted(name, 0.5, None), ours, float(n))
        assert held.expected(Wanted(A, 0.5, 1), False, None, 2.0)[1] == 0.5
        assert held.expected(Wanted(B, 0.5, 1), False, None, 2.0)[1] == 0.0
        held.sampled(AdaptersSampled(2), 2.0)
        assert held.expected(Wanted(A, 0.5, 1), True, None, 2.0)[1] == 0.0

    def test_those_that_wait_count_where_the_configuration_says_how_many_slots_there_are(self) -> None:
        held = Held()
        for name in (A, B, C):
            held.opened(Wanted(name, 0.5, 2), lasting(name, 5.0), 0.0)
        assert held.waiting(True) == 1

    @given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60), st.none() | st.integers(1, 4))
    def test_the_books_fit_whatever_comes(self, steps: list[tuple[int, bool]], slots: int | None) -> None:
        held, open_ = Held(), {}
        if slots is not None:
            held.sampled(AdaptersSampled(slots), 0.0)
        for n, (which, opens) in enumerate(steps):
            name, now = f"adapter-{which}", float(n)
            if opens:
                open_[n] = lasting(name, 1.0, str(n))
                held.opened(Wanted(name, 0.5, None), open_[n], now)
            elif open_:
                ended = open_.pop(next(iter(open_)))
                assert ended.adapter is not None
                held.closed(ended.adapter, ended, now)
            held.check(open_.values())
            for each in (A, name):
                assert all(seconds >= 0 for seconds in held.expected(Wanted(each, 0.5, 2), True, 1.0, now))

    def test_what_is_kept_in_mind_is_bounded(self) -> None:
        held = Held()
        for n in range(3 * MOST):
            ours = lasting(f"adapter-{n}", 1.0, str(n))
            held.opened(Wanted(f"adapter-{n}", 0.5, None), ours, float(n))
            held.closed(Wanted(f"adapter-{n}", 0.5, None), ours, float(n))
        assert repr(held).count("adapter-") == MOST


class TestHeldForASlot:
    """Where every slot is in use by others, a request goes to the first that becomes free, wherever that is."""

    def full(self, replicas: int = 2) -> tuple[Router, list[Route]]:
        """One slot each, one adapter in use on each; a load is quick."""
        made = router(replicas, queue=QueueSettings())
        made.pools[POOL].lora.load = LoadTime(0.05)
        for i in range(replicas):
            lists(made, i, A, B, C, D)
            tells(made, i, 1)
        return made, [route(made, request(model=name, subset=only(i))) for i, name in enumerate((A, B)[:replicas])]

    def test_it_goes_where_a_slot_becomes_free(self) -> None:
        made, running = self.full()
        held = made.arrive(request(model=C), 1.0)
        assert isinstance(held, Wait)
        assert made.turns(1.0) == []
        finish(made, running[1].flight, 2.0)
        (turn,) = made.turns(2.0)
        assert isinstance(turn.verdict, Route)
        assert (turn.ticket, turn.verdict.endpoints[0]) == (held.ticket, address(1))
        made.check()

    def test_others_pass_whom_it_does_not_concern(self) -> None:
        made, _ = self.full()
        waits = [made.arrive(request(text(400, n), model=C), 1.0) for n in range(LOOK_AHEAD + 6)]
        passing = [made.arrive(request(text(20_000, n), model=name), 1.1) for n, name in enumerate((MODEL, A, B))]
        tickets = {each.ticket for each in passing if isinstance(each, Wait)}
        assert {turn.ticket for turn in made.turns(1.1)} == tickets
        assert made.holding == len(waits)

    def test_those_for_the_same_adapter_go_together(self) -> None:
        made, running = self.full()
        for n in range(3):
            assert isinstance(made.arrive(request(text(40, n), model=C), 1.0), Wait)
        finish(made, running[0].flight, 2.0)
        assert [turn.verdict.endpoints[0] for turn in made.turns(2.0) if isinstance(turn.verdict, Route)] == [
            address(0)
        ] * 3

    def test_only_as_many_adapters_go_as_slots_became_free(self) -> None:
        made, running = self.full()
        first, second = (made.arrive(request(model=name), 1.0) for name in (C, D))
        assert isinstance(first, Wait)
        finish(made, running[0].flight, 2.0)
        assert [turn.ticket for turn in made.turns(2.0)] == [first.ticket]
        assert isinstance(second, Wait)
        assert made.holding == 1

    def test_unknown_slots_hold_nobody(self) -> None:
        made = router(1, queue=QueueSettings())
        made.pools[POOL].lora.load = LoadTime(0.05)
        lists(made, 0, A, B)
        for name in (A, B):
            assert isinstance(made.arrive(request(model=name), 0.0), Route)

    def test_without_the_queue_it_waits_in_the_engine(self) -> None:
        made = served(slots=1, replicas=1)
        route(made, request(model=A))
        assert isinstance(made.arrive(request(model=B), 0.1), Route)

    def test_what_others_run_takes_slots_while_the_sample_counts(self) -> None:
        held = Held()
        held.sampled(AdaptersSampled(1, (A,)), 0.0)
        assert not held.open_to(Wanted(B, 0.5, None), True)
        assert held.open_to(Wanted(A, 0.5, None), True)
        assert held.open_to(Wanted(B, 0.5, None), False)

    def test_ours_and_others_for_the_same_adapter_share_a_slot(self) -> None:
        held = Held()
        held.sampled(AdaptersSampled(2, (A,)), 0.0)
        held.opened(Wanted(A, 0.5, None), lasting(A, 5.0), 0.1)
        assert held.open_to(Wanted(B, 0.5, None), True)


class TestElsewhere:
    def test_a_replica_that_computes_the_prompt_needs_the_adapter_too(self) -> None:
        made = apart("prefill", "prefill", "decode", given=DisaggregationSettings(local_prefill=False))
        for i, adapters in enumerate(((), (A,), (A,))):
            lists(made, i, *adapters)
        sent = route(made, request(text(60_000), model=A))
        assert (sent.decision.prefiller, sent.endpoints) == (address(1), (address(2),))
        for i, used in ((1, {A: 1}), (2, {A: 1})):
            held = member(made, i).load.lora
            assert held is not None
            assert held.in_use == used
        made.check()
        load_s = made.pools[POOL].lora.load.s
        made.finish(sent.flight, ok(ttft_s=5.0, duration_s=6.0), 6.0)
        made.check()
        assert [held.in_use for i in (1, 2) if (held := member(made, i).load.lora) is not None] == [{}, {}]
        assert made.pools[POOL].lora.load.s == load_s

    def test_each_data_parallel_rank_has_slots_of_its_own(self) -> None:
        ranks = tuple(f"{address(0)}/{n}" for n in range(2))
        pool = PoolSettings(
            POOL, scraped=False, ranks=2, lora=LoraSettings(slots=1), queue=QueueSettings(enabled=False)
        )
        made = Router([pool], Random(1))
        made.learn(Reset(POOL, tuple(Replica(rank) for rank in ranks)), 0.0)
        for rank in ranks:
            made.learn(Serves(POOL, rank, (MODEL, A, B), {A: MODEL, B: MODEL}), 0.0)
        at = {name: route(made, request(model=name), n).endpoints[0] for n, name in enumerate((A, B))}
        assert set(at.values()) == set(ranks)
        for n, name in enumerate((B, A, A, B), 2):
            assert route(made, request(text(200, n), model=name), float(n)).endpoints[0] == at[name]


class TestLearning:
    def test_the_load_time_comes_near_what_loads_take(self) -> None:
        load = LoadTime(0.5)
        for _ in range(20):
            load.learn(2.0, 0.05)
        assert load.s == pytest.approx(2.0, rel=0.05)

    def test_what_came_after_a_long_wait_says_little(self) -> None:
        sure, unsure = LoadTime(0.5), LoadTime(0.5)
        sure.learn(1.0, 0.0)
        unsure.learn(1.0, 5.0)
        assert sure.s > 0.9
        assert unsure.s < 0.7

    def test_one_that_stood_still_does_not_set_it(self) -> None:
        load = LoadTime(0.5)
        load.learn(600.0, 0.0)
        assert load.s <= 4.0

    def test_many_that_stood_still_do_not_set_it_beyond_all_bounds(self) -> None:
        load = LoadTime(0.5)
        for _ in range(50):
            load.learn(1e9, 0.0)
        assert load.s == 60.0

    def test_loads_that_seemed_to_take_nothing_are_believed_no_longer_once_they_do(self) -> None:
        load = LoadTime(0.5)
        for _ in range(200):
            load.learn(-0.5, 0.05)
        assert load.s == 0.01
        for _ in range(20):
            load.learn(1.0, 0.05)
        assert load.s == pytest.approx(1.0, rel=0.1)

    def test_now_from_disk_and_now_from_memory_it_is_what_they_take_on_average(self) -> None:
        load, rng = LoadTime(0.5), Random(1)
        believed = []
        for _ in range(400):
            load.learn(rng.choice((0.01, 1.0)), 0.02)
            believed.append(load.s)
        assert fmean(believed[100:]) == pytest.approx(0.5, rel=0.2)

    def test_first_uses_teach_the_load_and_not_the_speed(self) -> None:
        made = router(1)
        adapters = [f"adapter-{n}" for n in range(30)]
        lists(made, 0, *adapters)
        tells(made, 0, 64)
        for n, name in enumerate(adapters):
            at = route(made, request(text(8000, n), model=name), 10.0 * n)
            took = 1.5 + at.decision.prediction.ttft_s - (at.decision.prediction.load_s or 0.0)
            made.finish(at.flight, ok(ttft_s=took, duration_s=took + 1.0), 10.0 * n + 5.0)
        assert made.pools[POOL].lora.load.s == pytest.approx(1.5, rel=0.1)
        assert member(made).speed.prefill_factor == pytest.approx(1.0, rel=0.05)

    def test_later_uses_teach_the_speed(self) -> None:
        made = served(replicas=1, slots=4)
        load = made.pools[POOL].lora.load
        loads = []
        for n in range(30):
            at = route(made, request(text(8000, n), model=A), 10.0 * n)
            made.finish(at.flight, ok(ttft_s=3 * at.decision.prediction.ttft_s, duration_s=30.0), 10.0 * n + 5.0)
            loads.append(load.s)
        assert member(made).speed.prefill_factor > 1.3
        assert set(loads) == {loads[0]}

    def test_whoever_waited_for_a_slot_teaches_neither(self) -> None:
        made = served(slots=1, replicas=1)
        pool = made.pools[POOL]
        for n in range(20):
            now = 100.0 * n
            first = route(made, request(text(8000, 2 * n), model=A, output=500), now)
            second = route(made, request(text(8000, 2 * n + 1), model=B, output=500), now)
            before = pool.lora.load.s, member(made).speed.prefill_factor, member(made).speed.base_s
            made.finish(second.flight, ok(ttft_s=60.0, duration_s=61.0), now + 61.0)
            assert (pool.lora.load.s, member(made).speed.prefill_factor, member(made).speed.base_s) == before
            finish(made, first.flight, now + 70.0)

    def test_another_prior_is_believed_and_what_was_learned_stays_otherwise(self) -> None:
        lora = Lora(LoraSettings(0.5))
        lora.load.learn(2.0, 0.0)
        lora.configure(LoraSettings(0.5, slots=4))
        assert lora.load.s > 1.5
        lora.configure(LoraSettings(3.0))
        assert lora.load.s == 3.0

    def test_settings_reach_the_pool(self) -> None:
        made = served(replicas=1)
        made.learn(Configured(POOL, PoolSettings(POOL, scraped=False, lora=LoraSettings(7.0))), 0.0)
        decision = made.explain(request(model=A), 0.0)
        assert isinstance(decision, Decision)
        assert decision.prediction.load_s == 7.0


def lasting(adapter: str, decode_s: float, name: str | None = None, queue_s: float = 0.0) -> Flight:
    """A flight that is expected to wait for so long, and then to run for `decode_s`."""
    made = flight(name or adapter, prefill_s=0.0, queue_s=queue_s)
    made.prediction.decode_s = decode_s  # type: ignore[misc]  # a record that nobody else has
    made.adapter = Wanted(adapter, 0.5, None)
    return made
