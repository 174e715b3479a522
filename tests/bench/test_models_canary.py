"""The measurement of canary shares, in small."""

from __future__ import annotations

from tests.bench.models_canary import SHARES, run


def test_shares_come_out_sessions_stay_and_nobody_moves_back() -> None:
    found = run(sessions=1000)
    assert found["asked"] == 0.05
    assert abs(found["got"] - 0.05) < 5 * (0.05 * 0.95 / 1000) ** 0.5
    assert found["shares"]["strayed"] == [0] * len(SHARES)
    assert found["shares"]["moved_back"] == [0] * len(SHARES)
