from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.models_exact import PHASES, measure


@pytest.mark.envoy
async def test_one_by_one_every_prediction_is_exact(tmp_path: Path) -> None:
    found = await measure(tmp_path, 12)
    assert found["requests"] == 12 * len(PHASES)
    assert found["fallback_share"] == 0.0
    assert found["phases"]["one_by_one"]["exact_share"] == 1.0
    assert found["phases"]["one_by_one"]["hit_share"] > 0.3
