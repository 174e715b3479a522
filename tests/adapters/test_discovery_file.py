from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from extproc.adapters.discovery import FileSource
from extproc.adapters.discovery import file as file_module
from extproc.core.types import Add, Change, Remove, Replica, Reset
from tests.support.waiting import until

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
NEVER_S = 60.0
"""Rechecks so far apart that only an event can have told."""


def replace(path: Path, *lines: str) -> None:
    """Write beside, then rename, as a careful writer does."""
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(f"- {line}\n" for line in lines) or "[]")
    new.rename(path)


class Watch:
    def __init__(self, source: FileSource, told: list[Change], mistakes: list[str]) -> None:
        self.source = source
        self.told = told
        self.mistakes = mistakes

    async def tells(self, *expected: Change) -> None:
        """Exactly these changes come, no more and no fewer; forgets them."""
        await until(lambda: len(self.told) >= len(expected))
        assert self.told == list(expected)
        self.told.clear()


@asynccontextmanager
async def watching(path: Path, recheck_s: float = NEVER_S, repeat_s: float = NEVER_S) -> AsyncIterator[Watch]:
    told: list[Change] = []
    mistakes: list[str] = []
    source = FileSource("p", path, {"gpu": "h100"}, on_error=mistakes.append, recheck_s=recheck_s, repeat_s=repeat_s)
    task = asyncio.create_task(source.run(told.append))
    try:
        yield Watch(source, told, mistakes)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def member(address: str, weight: float = 1.0, **labels: str) -> Replica:
    return Replica(address, {"gpu": "h100", **labels}, weight)


async def watched_for_sure(watch: Watch, write: Callable[[], object], *expected: Change) -> None:
    """Change the file until it is noticed: the watch begins some time after the first read."""
    deadline = asyncio.get_running_loop().time() + 5
    while not watch.told and asyncio.get_running_loop().time() < deadline:
        write()
        await asyncio.sleep(0.1)
    await watch.tells(*expected)


class TestEvents:
    async def test_a_rename_onto_the_file_brings_the_fewest_changes(self, tmp_path: Path) -> None:
        path = tmp_path / "replicas.yaml"
        replace(path, A, B)
        async with watching(path) as watch:
            await watch.tells(Reset("p", (member(A), member(B))))
            await watched_for_sure(watch, lambda: replace(path, B, C), Add("p", member(C)), Remove("p", A))
            replace(path, f"{{address: '{B}', labels: {{tp: 2}}}}", f"{{address: '{C}', weight: 2}}")
            await watch.tells(Add("p", member(B, tp="2")), Add("p", member(C, 2.0)))
            assert repr(watch.source) == f"<FileSource p: 2 replicas from {path}, good>"
            assert watch.source.errors == 0

    async def test_a_drain_comes_as_the_replica_anew_and_so_does_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "replicas.yaml"
        replace(path, A, B)
        drained = Replica(B, {"gpu": "h100"}, drain=True)
        async with watching(path) as watch:
            await watch.tells(Reset("p", (member(A), member(B))))
            await watched_for_sure(
                watch, lambda: replace(path, A, f"{{address: '{B}', drain: true}}"), Add("p", drained)
            )
            replace(path, A, B)
            await watch.tells(Add("p", member(B)))
            replace(path, A, f"{{address: '{B}', labels: {{drain: 'true'}}}}")
            await watch.tells(Add("p", drained))

    async def test_writing_in_place_and_appending_are_seen_too(self, tmp_path: Path) -> None:
        path = tmp_path / "replicas.yaml"
        path.write_text(f"- {A}\n")
        async with watching(path) as watch:
            await watch.tells(Reset("p", (member(A),)))
            await watched_for_sure(watch, lambda: path.write_text(f"- {A}\n- {B}\n"), Add("p", member(B)))

    async def test_a_swap_of_links_as_kubernetes_does_it_is_seen(self, tmp_path: Path) -> None:
        """A mounted ConfigMap: replicas.yaml -> ..data/replicas.yaml, ..data -> ..version; the middle link is swapped."""
        versions = iter(range(1, 1000))

        def publish(*lines: str) -> None:
            version = tmp_path / f"..v{next(versions)}"
            version.mkdir()
            (version / "replicas.yaml").write_text("".join(f"- {line}\n" for line in lines))
            link = tmp_path / "..data_tmp"
            link.symlink_to(version.name)
            link.rename(tmp_path / "..data")

        publish(A)
        path = tmp_path / "replicas.yaml"
        path.symlink_to("..data/replicas.yaml")
        async with watching(path) as watch:
            await watch.tells(Reset("p", (member(A),)))
            await watched_for_sure(watch, lambda: publish(B), Add("p", member(B)), Remove("p", A))

    async def test_other_files_in_the_directory_change_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "replicas.yaml"
        replace(path, A)
        async with watching(path, recheck_s=0.05) as watch:
            await watch.tells(Reset("p", (member(A),)))
            for i in range(5):
                (tmp_path / f"log{i}").write_text("x")
                await asyncio.sleep(0.02)
            replace(path, A, B)
            await watch.tells(Add("p", member(B)))


class TestMistakes:
    @pytest.mark.parametrize("content", [None, "replicas: 7"])
    async def test_that_last_are_said_again(self, tmp_path: Path, content: str | None) -> None:
        """Where nothing happens to the file, too: an alert on the count shall stay on."""
        path = tmp_path / "replicas.yaml"
        if content is not None:
            path.write_text(content)
        async with watching(path, recheck_s=0.02, repeat_s=0.05) as watch:
            await until(lambda: len(watch.mistakes) > 2)
            assert len(set(watch.mistakes)) == 1
            assert watch.source.errors == 1

    async def test_a_missing_directory_is_waited_for_and_counted_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "later" / "replicas.yaml"
        async with watching(path, recheck_s=0.02) as watch:
            await until(lambda: watch.source.mistake)
            await asyncio.sleep(0.1)  # several rechecks
            assert watch.told == []
            assert watch.mistakes == [f"{path}: No such file or directory"]
            path.parent.mkdir()
            replace(path, A)
            await watch.tells(Reset("p", (member(A),)))
            assert watch.source.mistake is None
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warnings == [f"{path}: No such file or directory; the members of pool p stay as they are"]

    async def test_a_file_that_does_not_parse_changes_nothing_and_is_counted_once_per_mistake(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "replicas.yaml"
        replace(path, A)
        async with watching(path, recheck_s=0.02) as watch:
            await watch.tells(Reset("p", (member(A),)))
            replace(path, "vllm-0:8000")
            await until(lambda: watch.source.errors == 1)
            replace(path, A, A)
            await until(lambda: watch.source.errors == 2)
            await asyncio.sleep(0.1)  # several rechecks of the same bad content
            assert watch.mistakes == [
                f"{path}: replicas[0].address: 'vllm-0:8000' is not ip:port; write the IP address instead of 'vllm-0'",
                f"{path}: replica {A} is listed twice; remove one",
            ]
            assert (
                repr(watch.source) == f"<FileSource p: 1 replicas from {path}, replica {A} is listed twice; remove one>"
            )
            replace(path, A, B)
            await watch.tells(Add("p", member(B)))
            assert watch.source.mistake is None

    async def test_a_deleted_file_keeps_the_members_and_its_return_changes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "replicas.yaml"
        replace(path, A)
        async with watching(path, recheck_s=0.02) as watch:
            await watch.tells(Reset("p", (member(A),)))
            path.unlink()
            await until(lambda: watch.source.errors == 1)
            replace(path, A)
            await until(lambda: watch.source.mistake is None)
            assert watch.told == []

    async def test_a_bad_file_at_the_start_gives_no_reset_until_it_is_good(self, tmp_path: Path) -> None:
        path = tmp_path / "replicas.yaml"
        path.write_text("")
        async with watching(path, recheck_s=0.02) as watch:
            await until(lambda: watch.source.errors == 1)
            assert watch.told == []
            replace(path)
            await watch.tells(Reset("p", ()))

    async def test_a_file_beyond_the_limit_is_not_parsed(self, tmp_path: Path) -> None:
        path = tmp_path / "replicas.yaml"
        path.write_bytes(b"#" * (file_module.MAX_BYTES + 1))
        async with watching(path) as watch:
            await until(lambda: watch.source.mistake)
            assert watch.source.mistake == f"larger than {file_module.MAX_BYTES} bytes"

    async def test_an_error_of_the_receiver_is_not_taken_for_one_of_the_file(self, tmp_path: Path) -> None:
        def emit(change: Change) -> None:
            raise RuntimeError("receiver")

        path = tmp_path / "replicas.yaml"
        replace(path, A)
        with pytest.raises(RuntimeError, match="receiver"):
            await FileSource("p", path, {}).run(emit)


async def test_a_directory_replaced_as_a_whole_is_found_by_the_recheck(tmp_path: Path) -> None:
    directory = tmp_path / "mount"
    directory.mkdir()
    replace(directory / "replicas.yaml", A)
    async with watching(directory / "replicas.yaml", recheck_s=0.05) as watch:
        await watch.tells(Reset("p", (member(A),)))
        new = tmp_path / "new"
        new.mkdir()
        replace(new / "replicas.yaml", B)
        directory.rename(tmp_path / "old")
        new.rename(directory)
        await watch.tells(Add("p", member(B)), Remove("p", A))


async def test_a_link_into_another_directory_is_followed_by_the_recheck(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    replace(there / "replicas.yaml", A)
    (here / "replicas.yaml").symlink_to(there / "replicas.yaml")
    async with watching(here / "replicas.yaml", recheck_s=0.05) as watch:
        await watch.tells(Reset("p", (member(A),)))
        for members in ([A, B], [A]):  # twice, for the first change may fall before the start of the watch
            replace(there / "replicas.yaml", *members)
            await watch.tells(Add("p", member(B)) if B in members else Remove("p", B))
