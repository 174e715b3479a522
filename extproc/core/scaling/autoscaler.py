"""How many replicas one pool should have: notes what comes, looks now and then, and says it.

Whoever starts and stops replicas asks for `asked` (metrics, the external scaler). What a look saw and what came of it is kept as
the last `Look`, for metrics and for people.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from extproc.core.admission.admission import Admission
from extproc.core.admission.fairness import charge_tokens
from extproc.core.fleet import Fleet, Member
from extproc.core.health.states import State
from extproc.core.record import record
from extproc.core.scaling import capacity
from extproc.core.scaling.arrivals import Arrivals, Mix
from extproc.core.scaling.capacity import ReplicaModel
from extproc.core.scaling.profile import Profile
from extproc.core.scaling.rules import RULES, Need, Seen, p95
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.scaling.share import Share
from extproc.core.scaling.steps import Steps
from extproc.core.scaling.warm import Role, WarmPool, roles
from extproc.core.speed import Speed
from extproc.core.steptime import prior

TTFT_S: Final = 60.0
"""First tokens of so many seconds make the percentile, ..."""
MOST_PREFILL: Final = 0.7
"""Share of prefill that is taken out of decode times at most: beyond, prompts wait and do not slow decode down further."""
MAX_TTFTS: Final = 2000
"""... and no more than so many."""
PAUSE_S: Final = 60.0
"""A look that is so late says that the process stood still. What came meanwhile was not counted, and must not be taken for nothing."""


@record
class Look:
    """What was seen at one moment, and what is asked for since then."""

    at: float
    seen: Seen
    need: Need
    asked: int
    fill_s: float
    """Seconds of prefill that arrive each second."""
    decode_s: float
    """Seconds of decode that arrive each second, at the batch that a replica can hold."""
    capacity_s: float | None
    """Such seconds per second that one replica serves within its SLO, among as many as are asked for; None before anything came."""


@record
class Asked:
    """What one request comes to."""

    speed: Speed
    """Of the replica that it goes to, or would."""
    uncached_tokens: int
    """Of its prompt, to be computed there."""
    cached_tokens: int
    prefill_s: float
    """Predicted, there."""
    output_tokens: float
    """Expected, of all its samples."""


NOBODY: Final = Speed(prior({}))
"""Where there is no replica yet: an 8B model on an A100."""


class Autoscaler:
    """One pool's."""

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings
        self.arrivals = Arrivals()
        self.last: Look | None = None
        self.gpu: float | None = None
        """Use of the pool's GPUs, 0 to 1, by whoever knows it; None where nobody does."""
        self._steps = Steps(settings)
        self._profile = Profile()
        self._warm = WarmPool(settings.warm) if settings.warm else None
        self._changes = 0
        self._active = 0
        """Replicas that were needed at the last look, spares aside."""
        self._total: int | None = None
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=MAX_TTFTS)
        self._share = Share()
        self._look_at = -math.inf
        self._busy_at = -math.inf

    def __repr__(self) -> str:
        return f"<autoscaler by {self.settings.rule}, {self._steps!r}>"

    @property
    def asked(self) -> int | None:
        """Replicas that the pool should have, spares included; None before the first look, when its members are not known."""
        return self._total

    @property
    def changes(self) -> int:
        """How often that has changed."""
        return self._changes

    def roles(self, fleet: Fleet, now: float) -> dict[Role, int]:
        """How many replicas of the pool are what to it."""
        present = len(_present(fleet, now))
        draining = sum(m.state(now) is State.DRAINING for m in fleet.members)
        return roles(self._total or 0, self._steps.asked or 0, present, draining)

    def configure(self, settings: ScalingSettings) -> None:
        """Go on with other settings; what was counted stays."""
        self.settings = self._steps.settings = settings
        if settings.warm is None:
            self._warm = None
        elif self._warm is None:
            self._warm = WarmPool(settings.warm)
        else:
            self._warm.settings = settings.warm

    def active(self, admission: Admission, fleet: Fleet, now: float) -> bool:
        """Whether there is anything to do, or was within the cooldown of a way down: a pool that may be empty must not be yet."""
        if len(admission) or any(len(member.load) or _of_others(member) >= 1.0 for member in fleet.members):
            self._busy_at = now
        return self.settings.min_replicas > 0 or now - self._busy_at < self.settings.down_cooldown_s

    # --- what happens -------------------------------------------------------------------------------------------------

    def arrived(self, asked: Asked, now: float) -> None:
        """A request came, to be routed or held."""
        self._busy_at = now
        self.arrivals.arrived(_work(asked), now)

    def first_token(self, ttft_s: float, now: float) -> None:
        """A client got its first token so long after its request."""
        self._ttfts.append((now, ttft_s))

    # --- looks --------------------------------------------------------------------------------------------------------

    def look(self, admission: Admission, fleet: Fleet, now: float) -> bool:
        """See what there is and decide, if it is time for it. Whether it was.

        A pool that is empty, and for which requests wait, need not wait for its time.
        """
        waits = self._steps.asked == 0 and len(admission) > 0
        if now < self._look_at and not waits:
            return False
        late_s, self._look_at = now - self._look_at, now + self.settings.interval_s
        present = _present(fleet, now)
        if self._steps.asked is None:
            spares = self._warm.settings.min_replicas if self._warm else 0
            self._steps.begin(max(len(present) - spares, 0), now)
            self._total = self._with_spares(self._steps.asked or 0, now)
        elif late_s > PAUSE_S:
            self._steps.begin(self._steps.asked, now)
        seen = self._seen(admission, fleet, present, now)
        if self.settings.daily:
            self._profile.note(seen.per_s, now)
        need = RULES[self.settings.rule](seen, self.settings)
        if not need.up_to and self.active(admission, fleet, now):
            need = Need(1, max(need.down_to, 1), need.settled)
        total = self._with_spares(self._steps.take(need, now), now)
        self._changes += total != self._total
        self._total = total
        self.last = self._looked(seen, need, total, now)
        return True

    def _with_spares(self, active: int, now: float) -> int:
        """Replicas in all. `active`: needed, cooldowns and steps observed."""
        if self._warm is None:
            return active
        spares = self._warm.take(self._active, active, now)
        self._active = active
        return min(active + spares, self.settings.max_replicas)

    def _looked(self, seen: Seen, need: Need, asked: int, now: float) -> Look:
        mix, model, settings = seen.mix, seen.model, self.settings
        decode_s = capacity.decode_s(model, mix, settings.tpot_target_s)
        per_s = capacity.per_s(model, mix, max(asked, 1), settings) if mix.requests else None
        return Look(
            at=now,
            seen=seen,
            need=need,
            asked=asked,
            fill_s=seen.per_s * mix.fill_s,
            decode_s=seen.per_s * decode_s,
            capacity_s=None if per_s is None else per_s * (mix.fill_s + decode_s),
        )

    def _seen(self, admission: Admission, fleet: Fleet, present: list[Member], now: float) -> Seen:
        settings, mix = self.settings, self.arrivals.mix(now)
        ours = sum(len(member.load) for member in fleet.members)
        others = sum(map(_of_others, fleet.members))
        # Others' requests are taken for work like ours: what they are nobody tells.
        share = self._share.take(ours, others, now)
        per_s, trend = share * self.arrivals.per_s(now), self.arrivals.trend(now)
        return Seen(
            asked=self._steps.asked or 0,
            replicas=len(present),
            model=_model(present or list(fleet.members), per_s * mix.fill_s),
            mix=mix,
            per_s=per_s,
            later_per_s=max(share * trend.per_s_in(settings.cold_start_s), self._usual(now)),
            growth_per_s2=share * trend.growth_per_s2,
            queue=len(admission) + sum(member.queued(now) or 0 for member in fleet.members),
            late_requests=_late(admission, present, mix, share, settings, now),
            in_flight=ours + others,
            ttft_p95_s=self._p95(now),
            gpu=self.gpu,
        )

    def _usual(self, now: float) -> float:
        """Requests a second that are usual at this time of day, or soon will be; 0 where that is not asked for, or not known."""
        if not self.settings.daily:
            return 0.0
        return self._profile.ahead(max(self.settings.daily_lead_s, self.settings.cold_start_s), now) or 0.0

    def _p95(self, now: float) -> float | None:
        while self._ttfts and self._ttfts[0][0] < now - TTFT_S:
            self._ttfts.popleft()
        return p95([ttft_s for _, ttft_s in self._ttfts])


def _work(asked: Asked) -> Mix:
    context = asked.uncached_tokens + asked.cached_tokens + 0.5 * asked.output_tokens
    return Mix(
        requests=1.0,
        uncached_tokens=asked.uncached_tokens,
        fill_s=asked.speed.fill_s(asked.uncached_tokens, asked.cached_tokens),
        prefill_s=asked.prefill_s,
        prefill_square_s2=asked.prefill_s**2,
        output_tokens=asked.output_tokens,
        context_tokens=asked.output_tokens * context,
    )


def _of_others(member: Member) -> float:
    """Requests there that are not ours: told by other routers, or seen in its samples."""
    return member.strangers + (member.others.requests if member.others is not None else 0)


def _present(fleet: Fleet, now: float) -> list[Member]:
    """Members that take requests, or will once they have been heard of."""
    out = (State.DRAINING, State.GONE)
    return [m for m in fleet.members if m.state(now) not in out and not m.health.unreachable(now)]


def _model(members: list[Member], fill_s: float) -> ReplicaModel:
    """The mean of the members; one A100 with an 8B model where there are none. `fill_s`: prefill that comes each second, for all."""
    speeds = [member.speed for member in members] or [NOBODY]

    def step_s(sequences: float, kv_tokens: float) -> float:
        return sum(speed.step_s(sequences, kv_tokens) for speed in speeds) / len(speeds)

    sizes = [size for m in members if m.sample is not None and (size := m.sample.kv_capacity_tokens)]
    return ReplicaModel(
        step_s=step_s,
        prefill_share=min(fill_s / len(speeds), MOST_PREFILL),
        kv_tokens=sum(sizes) / len(sizes) if sizes else None,
        base_s=speeds[0].base_s,
    )


def _late(
    admission: Admission, present: list[Member], mix: Mix, share: float, settings: ScalingSettings, now: float
) -> float:
    """Requests of the mix that wait for longer than the target: those held, here and in proportion by others, and prefill that
    stands too far behind.
    """
    if not mix.requests:
        return float(len(admission))
    held = share * admission.queue.tokens / charge_tokens(mix.uncached_tokens, mix.output_tokens)
    behind_s = sum(max(member.backlog_s(now) - settings.ttft_target_s, 0.0) for member in present)
    return held + (behind_s / mix.prefill_s if mix.prefill_s else 0.0)
