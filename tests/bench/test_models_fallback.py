from __future__ import annotations

from tests.bench.models_fallback import Asked, _back, _figures
from tests.support.provider import MODEL as ELSEWHERE


def test_errors_are_those_before_the_kill_and_after_it() -> None:
    asked = [
        Asked(1.0, 1.2, "large"),
        Asked(1.9, 2.5, None),
        Asked(2.1, 2.6, None),
        Asked(2.2, 2.4, ELSEWHERE),
    ]
    assert _figures(asked, killed=2.0) == {
        "errors": 2,
        "broken": 1,
        "requests": 4,
        "takeover_s": 0.1,
        "served": {"large": 1, "error": 2, ELSEWHERE: 1},
    }


def test_without_errors_nothing_had_to_be_taken_over_later() -> None:
    figures = _figures([Asked(1.0, 1.2, "large"), Asked(2.2, 2.4, ELSEWHERE)], killed=2.0)
    assert (figures["errors"], figures["takeover_s"]) == (0, 0.0)


def test_the_pool_is_back_when_the_last_answer_is_of_it() -> None:
    asked = [Asked(1.0, 1.2, ELSEWHERE), Asked(1.1, 1.9, "large"), Asked(1.5)]
    assert _back(asked)
    assert not _back([*asked, Asked(1.6, 2.0, ELSEWHERE)])
