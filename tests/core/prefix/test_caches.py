"""Two indexes, one answer: which of them tells, replica by replica and request by request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.health.states import State
from extproc.core.prefix.exact import UNIT, token_chain
from extproc.core.router import Router
from extproc.core.types import (
    Add,
    BlocksRemoved,
    BlocksStored,
    CacheChange,
    CacheChanged,
    CacheCleared,
    CacheUnknown,
    Decision,
    DrainAsked,
    DrainEnded,
    End,
    Outcome,
    Placed,
    PrefixSource,
    Progressed,
    Remove,
    Replica,
    Request,
    Route,
    TokenBlocks,
)
from tests.core.support import POOL, Log, address, chosen, member, ok, only, request, route, router, sample, text, usage

TEXT = text(4 * 1024)
"""Four bytes a token: as many tokens as the ids below."""
IDS = tuple(range(1024))
TOKENS = token_chain(IDS)


def asked(prompt: bytes = TEXT, tokens: TokenBlocks | None = TOKENS, **fields: Any) -> Request:
    """A tokenized request."""
    return replace(request(prompt, prompt_tokens=len(prompt) // 4, **fields), tokens=tokens)


def stored(ids: tuple[int, ...] = IDS, size: int = UNIT) -> BlocksStored:
    """All of a prompt."""
    whole = len(ids) // size
    return BlocksStored(tuple(range(whole)), None, ids[: whole * size], size)


def told(made: Router, i: int, *changes: CacheChange, now: float = 0.0, whole: bool = True) -> None:
    made.learn(CacheChanged(POOL, address(i), changes, whole), now)
    made.check()


def explained(made: Router, wanted: Request, now: float = 0.0) -> Decision:
    decision = made.explain(wanted, now)
    assert isinstance(decision, Decision)
    return decision


def cached(made: Router, i: int, wanted: Request) -> tuple[int, PrefixSource]:
    """Predicted for that replica, and by what."""
    decision = explained(made, replace(wanted, subset=only(i)))
    return decision.prediction.cached_tokens, decision.prefix_source


def sent(made: Router, i: int, wanted: Request, now: float = 0.0) -> str:
    """Its flight there."""
    return route(made, replace(wanted, subset=only(i)), now).flight


# --- which one tells --------------------------------------------------------------------------------------------------


def test_a_replica_that_tells_of_its_cache_is_believed() -> None:
    made = router(2)
    told(made, 0, stored())
    assert cached(made, 0, asked()) == (1008, PrefixSource.EXACT)
    assert cached(made, 1, asked()) == (0, PrefixSource.APPROXIMATE)
    assert chosen(made, asked()) == address(0)


def test_what_it_gave_up_is_gone_whatever_was_sent_there() -> None:
    made = router(1)
    told(made, 0)
    made.finish(sent(made, 0, asked()), ok(), 1.0)
    told(made, 0, stored(), BlocksRemoved(tuple(range(10, 64))))
    assert cached(made, 0, asked()) == (160, PrefixSource.EXACT)
    assert cached(made, 0, asked(tokens=None))[0] > 900


def test_a_request_that_is_not_tokenized_is_judged_by_what_was_sent() -> None:
    made = router(1)
    told(made, 0, stored())
    assert cached(made, 0, asked(tokens=None)) == (0, PrefixSource.APPROXIMATE)
    assert cached(made, 0, request()) == (0, PrefixSource.NONE)


def test_blocks_of_another_size_than_the_index_has_tell_nothing() -> None:
    made = router(1)
    told(made, 0, stored())
    assert cached(made, 0, asked(tokens=token_chain(IDS, 2 * UNIT))) == (0, PrefixSource.APPROXIMATE)


def test_a_cache_that_is_not_known_as_a_whole_is_worth_the_better_of_both() -> None:
    made = router(2)
    told(made, 0, stored(IDS[:512]), whole=False)
    assert cached(made, 0, asked()) == (512, PrefixSource.APPROXIMATE)
    made.finish(sent(made, 0, asked()), ok(), 1.0)
    hit, source = cached(made, 0, asked())
    assert (hit > 900, source) == (True, PrefixSource.APPROXIMATE)


def test_who_is_not_known_any_more_is_judged_by_what_was_sent() -> None:
    made = router(1)
    told(made, 0, stored())
    made.learn(CacheUnknown(POOL, address(0)), 1.0)
    assert cached(made, 0, asked()) == (0, PrefixSource.APPROXIMATE)
    made.check()


def test_who_goes_away_and_stays_after_all_is_known_as_before() -> None:
    made = router(1)
    told(made, 0, stored(IDS[:512]))
    made.learn(DrainAsked(POOL, address(0), within_s=1.0), 0.0)
    made.expire(2.0)
    assert member(made).state(2.0) is State.GONE
    told(made, 0, BlocksStored((32,), 31, IDS[512:528], UNIT), now=2.0)
    made.learn(DrainEnded(POOL, address(0)), 3.0)
    assert cached(made, 0, asked()) == (528, PrefixSource.EXACT)


def test_those_who_left_are_not_heard() -> None:
    made = router(2)
    told(made, 0, stored())
    made.learn(Remove(POOL, address(0)), 1.0)
    told(made, 0, stored())
    assert made.pools[POOL].caches.exact.addresses == set()


# --- how much ---------------------------------------------------------------------------------------------------------


def test_the_last_token_is_always_computed_and_its_block_with_it() -> None:
    made = router(1)
    told(made, 0, stored())
    for tokens, hit in ((1024, 1008), (1025, 1024), (1023, 1008), (17, 16), (16, 0), (1, 0)):
        wanted = asked(tokens=token_chain((*IDS, *IDS)[:tokens]))
        assert cached(made, 0, replace(wanted, prompt_tokens=tokens)) == (hit, PrefixSource.EXACT)


def test_hits_are_whole_blocks_of_the_replica() -> None:
    made = router(1)
    told(made, 0, stored(size=64))
    assert cached(made, 0, asked())[0] == 960
    assert cached(made, 0, replace(asked(tokens=token_chain(IDS[:200])), prompt_tokens=200))[0] == 192


def test_what_is_known_is_not_scaled_by_trust_and_teaches_none() -> None:
    made = router(1)
    told(made, 0, stored())
    member(made).hit_trust = 0.5
    assert cached(made, 0, asked()) == (1008, PrefixSource.EXACT)
    flight = sent(made, 0, asked())
    made.finish(flight, ok(address(0), usage=usage(1024, 10, 0)), 1.0)
    assert member(made).hit_trust == 0.5


def test_what_was_guessed_teaches_trust() -> None:
    made = router(1)
    made.finish(sent(made, 0, asked(tokens=None)), ok(), 1.0)
    flight = sent(made, 0, asked(tokens=None))
    made.finish(flight, ok(address(0), usage=usage(1024, 10, 0)), 2.0)
    assert member(made).hit_trust < 1.0


# --- what is on its way -----------------------------------------------------------------------------------------------


def test_the_second_of_a_burst_finds_what_the_first_will_bring() -> None:
    made = router(2)
    told(made, 0)
    flight = sent(made, 0, asked())
    assert cached(made, 0, asked()) == (1008, PrefixSource.EXACT)
    assert cached(made, 0, asked(tokens=token_chain((*IDS[:500], *range(2000))[:1024]))) == (496, PrefixSource.EXACT)
    made.finish(flight, Outcome(End.CLIENT_GONE), 1.0)
    assert cached(made, 0, asked()) == (0, PrefixSource.EXACT)
    made.check()


def test_what_is_on_its_way_counts_in_whole_blocks_of_the_replica() -> None:
    made = router(1)
    told(made, 0, stored(tuple(range(5000, 5128)), size=128))
    sent(made, 0, asked())
    assert cached(made, 0, asked())[0] == 896


def test_what_the_proxy_sent_on_is_on_its_way_there() -> None:
    made = router(2)
    told(made, 0)
    told(made, 1)
    flight = sent(made, 0, asked())
    made.learn(Progressed(flight, None, None, 0, address(1)), 1.0)
    assert [cached(made, i, asked())[0] for i in (0, 1)] == [0, 1008]
    made.finish(flight, ok(address(1)), 2.0)
    made.check()
    assert cached(made, 1, asked())[0] == 0


def test_a_restart_loses_what_is_on_its_way() -> None:
    made = router(1)
    told(made, 0, stored())
    sample(made, 0, 1.0, prompt_tokens=100.0)
    flight = sent(made, 0, asked(), 1.0)
    sample(made, 0, 2.0, prompt_tokens=5.0)
    assert cached(made, 0, asked())[0] == 0
    made.finish(flight, Outcome(End.UPSTREAM_ERROR), 3.0)
    made.check()


def test_a_restart_that_events_told_first_does_not_empty_what_they_told_since() -> None:
    made = router(1)
    told(made, 0, stored())
    sample(made, 0, 1.0, prompt_tokens=100.0)
    told(made, 0, CacheCleared(), stored(), now=1.5)
    sample(made, 0, 2.0, prompt_tokens=5.0)
    assert cached(made, 0, asked())[0] == 1008


def test_what_peers_placed_says_nothing_of_a_cache_that_is_known() -> None:
    made = router(1)
    told(made, 0)
    made.learn(Placed(POOL, address(0), asked().blocks), 0.0)
    assert cached(made, 0, asked()) == (0, PrefixSource.EXACT)


def test_the_decision_and_the_flight_say_what_told() -> None:
    log = Log()
    made = router(1, observer=log)
    told(made, 0, stored())
    made.finish(sent(made, 0, asked()), ok(), 1.0)
    made.finish(sent(made, 0, asked(tokens=None), 2.0), ok(), 3.0)
    made.finish(sent(made, 0, request(), 4.0), ok(), 5.0)
    sources = [PrefixSource.EXACT, PrefixSource.APPROXIMATE, PrefixSource.NONE]
    assert [decision.prefix_source for decision in log.decisions] == sources
    assert [ended.flight.prefix_source for ended in log.ends] == sources


# --- whatever happens -------------------------------------------------------------------------------------------------


ACTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["arrive", "finish", "fail", "sent on", "store", "remove", "clear", "unknown", "leave", "join", "restart"]
        ),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(ACTS)
def test_the_books_balance_whatever_happens(acts: list[tuple[str, int, int]]) -> None:
    made = router(3)
    flights: list[str] = []
    for now, (act, i, n) in enumerate(acts):
        where, ids = address(i), tuple(range(n, n + 40 * UNIT))
        match act:
            case "arrive":
                verdict = made.arrive(asked(text(40 * UNIT * 4, n), token_chain(ids)), float(now))
                flights += [verdict.flight] if isinstance(verdict, Route) else []
            case "finish" | "fail" if flights:
                outcome = ok(where) if act == "finish" else Outcome(End.UPSTREAM_ERROR, 500, where)
                made.finish(flights.pop(n % len(flights)), outcome, float(now))
            case "sent on" if flights:
                made.learn(Progressed(flights[n % len(flights)], None, None, 0, where), float(now))
            case "store":
                made.learn(CacheChanged(POOL, where, (stored(ids, UNIT * (1 + n % 2)),), n < 3), float(now))
            case "remove":
                made.learn(CacheChanged(POOL, where, (BlocksRemoved(tuple(range(n, 40, 4))),)), float(now))
            case "clear":
                made.learn(CacheChanged(POOL, where, (CacheCleared(),)), float(now))
            case "unknown":
                made.learn(CacheUnknown(POOL, where), float(now))
            case "leave":
                made.learn(Remove(POOL, where), float(now))
            case "join":
                made.learn(Add(POOL, Replica(where)), float(now))
            case "restart":
                for counter in (100.0, 1.0):
                    sample(made, i, now + counter / 1000, prompt_tokens=counter)
        made.check()
    for flight in flights:
        made.finish(flight, ok(), 1000.0)
    made.check()
    assert len(made.pools[POOL].caches.pending) == 0
