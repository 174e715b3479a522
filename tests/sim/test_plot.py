"""Charts of simulated runs: what stands in them, in both formats."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from extproc.sim import plot
from extproc.sim.simulate_report import Curves, Load

ONE = Curves(ttft_s=(0.3, 0.1, 0.2), e2e_s=(1.0, 4.0), requests={"10.0.0.1:8000": ((0.0, 1), (1.0, 3))})
NOTHING = Curves((), (), {"10.0.0.1:8000": ()})


def load(speed_up: float, curves: Curves = ONE, *policies: str) -> Load:
    rates: dict[str, Any] = {"offered_requests_per_s": 2 * speed_up, "goodput_requests_per_s": speed_up}
    names = policies or ("predicted", "random")
    return Load(speed_up, dict.fromkeys(names, rates), dict.fromkeys(names, curves))


def written(directory: Path, name: str, *loads: Load) -> bytes:
    path = directory / name
    plot.write(path, "A <title>", loads)
    return path.read_bytes()


def drawn(panel: plot.Panel) -> Axes:
    axes = Figure().subplots()
    panel(axes)
    return axes


def points(axes: Axes) -> dict[object, list[tuple[float, float]]]:
    return {line.get_label(): [(x, y) for x, y in numpy.asarray(line.get_xydata()).tolist()] for line in axes.lines}


def test_the_page_has_each_chart_of_each_load_and_fetches_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, "plot.html", load(1), load(2.5)).decode()
    assert text.count("<svg") == 1
    assert "A &lt;title&gt;" in text
    for chart in (
        "Time to first token",
        "End to end",
        "Load of each replica: predicted",
        "Load of each replica: random",
    ):
        for speed_up in ("1", "2.5"):
            assert text.count(f">{chart}, speed-up {speed_up}<") == 1
    assert text.count(">Goodput against offered load<") == 1
    assert not re.search(r"<script|<link|<image|src=|@import|url\((?!#)|href=\"(?!#)", text)
    assert "nan" not in text
    assert "<?xml" not in text


@pytest.mark.parametrize("name", ["plot.html", "plot.png"])
def test_the_same_runs_write_the_same_bytes(name: str, tmp_path: Path) -> None:
    assert written(tmp_path, name, load(1), load(2)) == written(tmp_path, f"again_{name}", load(1), load(2))
    assert written(tmp_path, name, load(1), load(2)) != written(tmp_path, name, load(1), load(3))


def test_a_png_is_one_and_has_no_date(tmp_path: Path) -> None:
    data = written(tmp_path, "plot.png", load(1))
    assert data.startswith(b"\x89PNG\r\n")
    assert b"tIME" not in data
    assert b"Software" not in data


@pytest.mark.parametrize("name", ["plot.html", "plot.png"])
def test_runs_in_which_nothing_was_answered_can_be_drawn(name: str, tmp_path: Path) -> None:
    assert written(tmp_path, name, load(1, NOTHING))


def test_the_name_of_a_policy_is_no_formula(tmp_path: Path) -> None:
    text = written(tmp_path, "plot.html", load(1, ONE, "header:name=$a$", "a<b")).decode()
    assert text.count(">header:name=$a$<") == 3
    assert text.count(">a&lt;b<") == 3


def test_more_lines_than_a_legend_can_name_have_none(tmp_path: Path) -> None:
    many = Curves(ONE.ttft_s, ONE.e2e_s, {f"10.0.0.{i}:8000": ((0.0, 1),) for i in range(17)})
    assert "10.0.0.1<" in written(tmp_path, "few.html", load(1)).decode()
    assert "10.0.0.1<" not in written(tmp_path, "many.html", load(1, many)).decode()


def test_a_distribution_is_cumulative() -> None:
    axes = drawn(lambda axes: plot._distribution("x", {"predicted": (0.3, 0.1, 0.2)}, axes))
    assert points(axes) == {"predicted": [(0.1, pytest.approx(1 / 3)), (0.2, pytest.approx(2 / 3)), (0.3, 1.0)]}


def test_goodput_is_a_line_for_each_policy_by_offered_load() -> None:
    axes = drawn(lambda axes: plot._goodput([load(3), load(1)], axes))
    assert points(axes) == {name: [(2.0, 1.0), (6.0, 3.0)] for name in ("predicted", "random")}


def test_the_load_of_an_hour_is_smoothed_to_what_can_be_seen() -> None:
    at_s, requests = plot._smooth([(float(i), i % 2) for i in range(3600)])
    assert (len(at_s), at_s[:2], set(requests)) == (150, [0.0, 24.0], {0.5})
    assert plot._smooth([(0.0, 1), (1.0, 3)]) == ([0.0, 1.0], [1, 3])


def test_without_matplotlib_the_command_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['matplotlib'] = None; from extproc.cli import main; main()"
    options = ("simulate", "--generate", "sessions=2", "--plot", "x.html")
    done = subprocess.run([sys.executable, "-c", hidden, *options], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (1, "Error: --plot needs matplotlib; pip install 'extproc[plot]'")


def test_nothing_of_matplotlib_is_loaded_by_a_command_that_does_not_draw() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from extproc.cli import main;"
        "r = CliRunner().invoke(main, ['simulate', '--generate', 'sessions=2']);"
        "print(r.exit_code, 'matplotlib' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0 False False"
