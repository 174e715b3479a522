from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.flights import Flight, Ledger, LedgerError, Load

from .support import flight

# --- the load: sums ---------------------------------------------------------------------------------------------------


def opened(load: Load, *flights: Flight) -> None:
    for each in flights:
        load.open(each, each.routed_at)
        load.check()


def test_a_flight_opens_and_closes_once() -> None:
    load, one = Load(), flight("a")
    load.open(one, 0.0)
    with pytest.raises(LedgerError, match="already open"):
        load.open(one, 0.0)
    load.close(one, 1.0)
    with pytest.raises(LedgerError, match="not open"):
        load.close(one, 1.0)


def test_held_tokens_are_the_prompt_and_half_of_the_output_of_each_sample() -> None:
    load = Load()
    opened(load, flight("a", prompt_tokens=1000, output_tokens=100, samples=3))
    assert load.held_tokens == 1150
    assert load.output_tokens == 300


def test_nothing_is_held_once_all_have_ended() -> None:
    load = Load()
    flights = [flight(str(i), prompt_tokens=i, output_tokens=0.1 * i) for i in range(100)]
    opened(load, *flights)
    for each in flights:
        load.close(each, 1.0)
    assert (load.held_tokens, load.output_tokens, load.backlog_s(1.0), len(load)) == (0.0, 0.0, 0.0, 0)


def test_a_flight_counts_as_prefilling_until_the_predicted_time_and_as_decoding_then() -> None:
    load = Load()
    opened(load, flight("a", prefill_s=1.0, output_tokens=20, prompt_tokens=500))
    assert (load.prefilling(0.9), load.decoding(0.9), load.queued_tokens(0.9), load.decoding_tokens(0.9)) == (
        1,
        0,
        500,
        0,
    )
    assert (load.prefilling(1.0), load.decoding(1.0), load.queued_tokens(1.0), load.decoding_tokens(1.0)) == (
        0,
        1,
        0,
        20,
    )


def test_cached_tokens_do_not_queue() -> None:
    load = Load()
    opened(load, flight("a", prompt_tokens=500, cached=400))
    assert load.queued_tokens(0.0) == 100


# --- the load: the timeline of prefills -------------------------------------------------------------------------------


def test_prefills_queue_behind_each_other_and_drain_with_time() -> None:
    load = Load()
    opened(load, *(flight(n, prefill_s=1.0) for n in "abc"))
    assert [load.backlog_s(t) for t in (0.0, 0.5, 2.0, 3.0, 9.0)] == [3.0, 2.5, 1.0, 0.0, 0.0]
    assert [load.prefilling(t) for t in (0.0, 1.0, 2.0, 3.0)] == [3, 2, 1, 0]


def test_an_idle_replica_starts_when_the_request_comes() -> None:
    load = Load()
    opened(load, flight("a", prefill_s=1.0), flight("b", prefill_s=1.0, at=5.0))
    assert load.backlog_s(5.0) == 1.0


def test_an_early_first_token_moves_those_behind_forward() -> None:
    load = Load()
    a, b = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0)
    opened(load, a, b)
    load.first_token(a, 0.4)
    assert load.backlog_s(0.5) == pytest.approx(0.9)


def test_a_late_first_token_moves_those_behind_back() -> None:
    load = Load()
    a, b = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0)
    opened(load, a, b)
    load.first_token(a, 1.5)
    assert load.backlog_s(1.5) == pytest.approx(1.0)


def test_a_late_report_of_a_first_token_keeps_the_work_between() -> None:
    """Reports come up to a second after the fact: `b` and `c` both still stand behind `a` then."""
    load = Load()
    a, b, c = (flight(n, prefill_s=1.0) for n in "abc")
    opened(load, a, b, c)
    load.first_token(a, 1.2)  # told at 2.5, when b is believed done
    assert load.backlog_s(2.5) == pytest.approx(0.7)


def test_reading_the_load_changes_nothing() -> None:
    read, unread = Load(), Load()
    for load in (read, unread):
        a, b = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0)
        opened(load, a, b)
        if load is read:
            assert (load.backlog_s(5.0), load.prefilling(5.0), load.queued_tokens(5.0)) == (0.0, 0, 0)
            assert load.decoding_tokens(5.0) == load.output_tokens
        load.first_token(a, 4.5)
    assert read.backlog_s(5.0) == unread.backlog_s(5.0) == pytest.approx(0.5)


def test_a_first_token_says_that_those_before_are_done_too() -> None:
    load = Load()
    a, b, c = (flight(n, prefill_s=1.0) for n in "abc")
    opened(load, a, b, c)
    load.first_token(b, 0.5)
    assert load.prefilling(0.5) == 1
    load.first_token(a, 0.3)  # nothing new
    assert load.backlog_s(0.5) == pytest.approx(1.0)


def test_a_flight_without_a_byte_past_its_time_is_prefilling_again() -> None:
    load = Load()
    a = flight("a", prefill_s=1.0)
    opened(load, a)
    assert load.prefilling(2.0) == 0
    load.still_prefilling(a, 2.0)
    assert load.prefilling(2.0) == 1
    assert load.backlog_s(2.0) == pytest.approx(0.25 + 0.5)
    load.check()


def test_a_flight_without_a_byte_before_its_time_changes_nothing() -> None:
    load = Load()
    a = flight("a", prefill_s=1.0)
    opened(load, a)
    load.still_prefilling(a, 0.9)
    assert load.backlog_s(0.9) == pytest.approx(0.1)


def test_a_replica_that_hangs_looks_worse_the_longer_it_hangs() -> None:
    load = Load()
    a = flight("a", prefill_s=0.1)
    opened(load, a)
    backlogs = []
    for second in range(1, 30):
        load.still_prefilling(a, float(second))
        backlogs.append(load.backlog_s(float(second)))
    assert backlogs[-1] > 10.0
    assert sorted(backlogs)[-1] == max(backlogs[-3:])


def test_what_came_after_a_late_one_is_late_as_well() -> None:
    load = Load()
    a, b = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0)
    opened(load, a, b)
    load.still_prefilling(a, 4.0)
    assert load.prefilling(4.0) == 2
    assert load.backlog_s(4.0) == pytest.approx(0.25 + 1.5 + 1.0)


def test_one_that_was_overtaken_comes_back_to_the_head() -> None:
    load = Load()
    a, b, c = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0), flight("c", prefill_s=1.0, at=1.9)
    opened(load, a, b, c)
    load.first_token(b, 2.0)
    load.still_prefilling(a, 2.5)
    load.check()
    assert load.prefilling(2.5) == 2


def test_the_end_of_the_flight_in_work_hands_its_time_to_the_next() -> None:
    load = Load()
    a, b, c = (flight(n, prefill_s=1.0) for n in "abc")
    opened(load, a, b, c)
    load.close(a, 0.2)
    assert load.backlog_s(0.2) == pytest.approx(2.0)


def test_the_end_of_a_waiting_flight_takes_its_own_time_off() -> None:
    load = Load()
    a, b, c = (flight(n, prefill_s=1.0) for n in "abc")
    opened(load, a, b, c)
    load.close(b, 0.2)
    assert load.backlog_s(0.2) == pytest.approx(1.8)
    assert a.prefill_done_at == pytest.approx(1.0)
    load.check()


def test_the_end_of_the_last_flight_leaves_the_others_alone() -> None:
    load = Load()
    a, b = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0)
    opened(load, a, b)
    load.close(b, 0.2)
    assert load.backlog_s(0.2) == pytest.approx(0.8)


def test_the_end_of_a_flight_believed_done_leaves_the_queue_alone() -> None:
    load = Load()
    a, b = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0)
    opened(load, a, b)
    load.close(a, 1.5)
    assert load.backlog_s(1.5) == pytest.approx(0.5)


def test_a_gap_without_work_stays_a_gap() -> None:
    load = Load()
    a, b = flight("a", prefill_s=1.0), flight("b", prefill_s=1.0, at=3.0)
    opened(load, a, b)
    load.first_token(a, 0.5)
    assert b.prefill_done_at == 4.0


steps = st.lists(
    st.tuples(
        st.sampled_from(["open", "first", "still", "close"]),
        st.integers(0, 7),
        st.floats(0.0, 2.0),
        st.floats(0.0, 1.0),
    ),
    max_size=60,
)


@given(steps)
def test_whatever_happens_the_load_is_consistent(script: list[tuple[str, int, float, float]]) -> None:
    load, now, count = Load(), 0.0, 0
    live: list[Flight] = []
    for what, which, seconds, part in script:
        now += 0.5 * seconds
        if what == "open":
            count += 1
            live.append(flight(f"f{count}", prefill_s=seconds, at=now, prompt_tokens=which * 100 + 1))
            load.open(live[-1], now)
        elif live:
            one = live[which % len(live)]
            if what == "first" and one.first_token_at is None:
                load.first_token(one, one.routed_at + part * (now - one.routed_at))
            elif what == "still" and one.first_token_at is None:
                load.still_prefilling(one, now)
            elif what == "close":
                live.remove(one)
                load.close(one, now)
        load.check()
        assert load.backlog_s(now) >= 0.0
        assert 0 <= load.prefilling(now) <= len(load) == len(live)
        assert load.prefilling(now) + load.decoding(now) == len(live)
        assert load.queued_tokens(now) >= 0
        assert 0.0 <= load.decoding_tokens(now) <= load.output_tokens + 1e-6
        assert (load.backlog_s(now) > 0.0) == (load.prefilling(now) > 0)
    for one in live:
        load.close(one, now)
    assert (load.held_tokens, load.output_tokens, load.prefilling(now)) == (0.0, 0.0, 0)


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_ends_a_flight_once() -> None:
    ledger, one = Ledger(), flight("a")
    ledger.open(one)
    with pytest.raises(LedgerError):
        ledger.open(one)
    assert ledger.close("a") is one
    assert ledger.close("a") is None
    assert (ledger.opened, ledger.closed, len(ledger)) == (1, 1, 0)
    ledger.check()


def test_flights_expire_in_the_order_in_which_they_were_last_heard_of() -> None:
    ledger = Ledger()
    a, b, c = (flight(n, at=float(i), ttl_s=10.0) for i, n in enumerate("abc"))
    for each in (a, b, c):
        ledger.open(each)
    ledger.touch(a, 15.0)
    assert ledger.next_expiry() == 11.0
    assert ledger.expired(10.9) == []
    assert ledger.expired(11.0) == [b]
    assert ledger.expired(15.0) == [b, c, a]


def test_an_empty_ledger_has_no_expiry() -> None:
    assert Ledger().next_expiry() is None


def test_reprs_are_status_lines() -> None:
    ledger, load, one = Ledger(), Load(), flight("a", prompt_tokens=7)
    ledger.open(one)
    load.open(one, 0.0)
    assert repr(ledger) == "<ledger 1 opened - 0 closed = 1 open>"
    assert repr(load) == "<load 1 flights, 1 without first token, 57 tokens held>"
    assert repr(one) == "<flight a prefilling on 10.0.0.1:8000, 7 prompt tokens>"
    load.first_token(one, 0.5)
    assert repr(one) == "<flight a decoding on 10.0.0.1:8000, 7 prompt tokens>"


# --- steps that several share -----------------------------------------------------------------------------------------


def sharing(*queued: tuple[int, float], now: float = 0.0, budget: int = 8192) -> tuple[int, int]:
    """Flights of (uncached tokens, seconds of prefill), all arrived at 0 in that order."""
    load = Load()
    for n, (tokens, prefill_s) in enumerate(queued):
        load.open(flight(f"f{n}", prompt_tokens=tokens, prefill_s=prefill_s), 0.0)
    return load.sharing_step(now, budget)


def test_what_has_begun_takes_nobody_in() -> None:
    assert sharing() == (0, 0)
    assert sharing((1000, 0.1)) == (0, 0)


def test_short_prompts_behind_it_share_a_step() -> None:
    assert sharing((8000, 0.3), (1000, 0.1), (2000, 0.1)) == (2, 3000)


def test_a_full_step_takes_nobody_in() -> None:
    assert sharing((8000, 0.3), (5000, 0.2), (5000, 0.2)) == (1, 5000)
    assert sharing((8000, 0.3), (8192, 0.3)) == (1, 8192)


def test_of_a_long_prompt_only_the_last_chunk_has_room() -> None:
    assert sharing((8000, 0.3), (500, 0.1), (8192 + 700, 0.4)) == (1, 700)


def test_as_time_goes_on_the_queue_begins() -> None:
    queued = ((8000, 0.3), (1000, 0.1), (2000, 0.1))
    assert sharing(*queued, now=0.35) == (1, 2000)
    assert sharing(*queued, now=0.45) == (0, 0)
