"""The Dockerfile: there is no container engine where the tests run, so what can be told by reading it."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from itertools import pairwise

from tests.deploy.support import DEPLOY, ROOT

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages() -> list[list[Instruction]]:
    """Instructions of each stage; those before the first belong to none."""
    listed = instructions()
    starts = [i for i, (word, _) in enumerate(listed) if word == "FROM"]
    return [listed[a:b] for a, b in pairwise([*starts, len(listed)])]


def of(stage: list[Instruction], word: str) -> list[str]:
    return [rest for w, rest in stage if w == word]


def ignored(path: str) -> bool:
    """By .dockerignore, where the last pattern that applies decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            keep, pattern = pattern.startswith("!"), pattern.removeprefix("!")
            parents = [path, *(path[:i] for i, c in enumerate(path) if c == "/")]
            if any(fnmatch(p, pattern.removeprefix("**/")) for p in parents):
                verdict = not keep
    return verdict


def test_base_images_have_a_version() -> None:
    defaults = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    bases = [re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], of(stage, "FROM")[0]).split()[0] for stage in stages()]
    assert bases
    assert all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases), bases


def test_the_image_runs_as_nobody_in_particular() -> None:
    users = of(stages()[-1], "USER")
    assert users == ["65532:65532"], "by number: a kubelet cannot tell whether a name is root"


def test_packages_are_installed_by_hash_only() -> None:
    installs = [run for stage in stages() for run in of(stage, "RUN") if "pip install" in run]
    assert installs
    assert all("--require-hashes" in run or "--no-index" in run for run in installs)


def test_the_last_stage_installs_nothing() -> None:
    assert not [run for run in of(stages()[-1], "RUN") if re.search(r"\b(pip|apt-get|curl|wget)\b", run)]


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    sources = [
        source
        for stage in stages()
        for copy in of(stage, "COPY")
        if not copy.startswith("--from")
        for source in copy.split()[:-1]
    ]
    assert sources
    assert [s for s in sources if not (ROOT / s).exists()] == []
    assert [s for s in sources if ignored(s)] == []


def test_nothing_else_reaches_the_build() -> None:
    assert ignored("tests/test_app.py")
    assert ignored(".venv/bin/python")
    assert ignored("deploy/docker-compose.yaml")
    assert not ignored("extproc/app.py")


def test_health_is_asked_of_the_process_itself() -> None:
    assert [check for check in of(stages()[-1], "HEALTHCHECK") if "/livez" in check]


def test_signals_reach_the_process() -> None:
    """The exec form: a shell in between would take SIGTERM for itself."""
    assert of(stages()[-1], "ENTRYPOINT") == ['["extproc"]']
