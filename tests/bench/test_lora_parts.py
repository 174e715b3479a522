"""The measurement of LoRA-awareness, in small."""

from __future__ import annotations

from tests.bench.lora import ADAPTERS, Scarce, loads, names, play, play_scarce, run, trace


def test_it_is_worth_something() -> None:
    found = run(requests=300, seeds=1)
    assert found["ratio"] < 0.8
    assert found["loads"]["with"] < 0.7 * found["loads"]["without"]
    assert (found["adapters"], found["replicas"], found["slots"]) == (20, 4, 4)


def test_so_is_holding_those_for_which_no_slot_is_free() -> None:
    in_engine, held = (play_scarce(Scarce(2, 8.0, 0.0), 1, at_router, requests=500) for at_router in (False, True))
    assert in_engine["adapters"] is not None
    assert held["adapters"] is not None
    assert held["adapters"] < 0.8 * in_engine["adapters"]


def test_both_runs_meet_the_same_requests() -> None:
    aware, blind = play(1, True, requests=60), play(1, False, requests=60)
    assert sorted((s.turn, s.arrived_s, s.prompt_tokens) for s in aware.served) == sorted(
        (s.turn, s.arrived_s, s.prompt_tokens) for s in blind.served
    )
    assert loads(aware) >= 1


def test_what_is_predicted_of_loads_is_what_happens() -> None:
    """With samples and ends that come late, as in the service."""
    result = play(1, True, requests=300)
    [sidecar] = result.sidecars
    learned = sidecar.router.pools["default"].lora.load.s
    assert 0.25 < learned < 0.36  # a load takes 0.3 s


def test_every_adapter_is_asked_for_and_the_first_most() -> None:
    asked = [turn.adapter for turn in trace(1, 2000).turns]
    assert set(asked) == set(names())
    assert asked.count(names()[0]) > 2000 / ADAPTERS * 3
