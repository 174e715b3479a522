"""A process that stood still knows it before it draws conclusions."""

from __future__ import annotations

from extproc.adapters.pulse import BEAT_S, SETTLE_S, STALL_S, Pulse


class At:
    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[float] = []
        self.pulse = Pulse(lambda: self.now, self.told.append)

    def after(self, seconds: float) -> At:
        self.now += seconds
        return self


async def test_beats_in_time_say_nothing() -> None:
    at = At()
    at.pulse.start()
    for _ in range(5):
        at.after(BEAT_S + 0.02).pulse.beat()
        assert not at.pulse.settling(at.now)
    assert at.told == []
    at.pulse.stop()


async def test_a_late_beat_tells_for_how_long_nothing_ran() -> None:
    at = At()
    at.pulse.start()
    at.after(BEAT_S + 5.0).pulse.beat()
    assert [round(s, 3) for s in at.told] == [5.0]
    assert at.pulse.stalls == 1
    assert at.pulse.settling(at.now)
    settled_at = at.now + SETTLE_S
    while at.after(BEAT_S).now < settled_at:
        at.pulse.beat()
        assert at.pulse.settling(at.now)
    assert not at.pulse.settling(at.now)
    at.pulse.stop()


async def test_whoever_wakes_before_the_beat_is_warned_too() -> None:
    """After a pause all timers fire in one round, in any order."""
    at = At()
    at.pulse.start()
    assert not at.pulse.settling(at.after(BEAT_S + STALL_S / 2).now)
    assert at.pulse.settling(at.after(STALL_S).now)
    at.pulse.stop()
    assert not at.pulse.settling(at.now)
