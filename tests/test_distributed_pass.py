"""The pass over images divided among workers: equal artefacts, lost workers, interrupts, and what is refused."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from engine.commands.jobfile import read_job
from engine.data.images import (
    decode_rgb,
    image_source,
    open_images,
)
from engine.driver.executors.local import LocalExecutor
from engine.driver.executors.ray import RayExecutor
from engine.driver.scheduler_loop import WorkersFailingError
from engine.driver.scheduling.messages import WorkerLost
from engine.errors import EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_USER, JobError, RiskforgeError
from engine.studies.prepare.observation import Observer, load_part_observer, signature
from tests import commands
from tests.conftest import REPOSITORY
from tests.prepare_cases import (
    LABELS,
    NUM_IMAGES,
    QUICKSTART,
    Sample,
    drawn_digits,
    plain_image,
    png,
    prepare,
    same_bytes,
    write_folder,
    write_run,
    write_tables,
    write_tar,
)
from tests.sleepy import wait_until


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return drawn_digits(NUM_IMAGES)


@pytest.fixture(scope="module")
def tars(samples, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), samples)


@pytest.fixture(scope="module")
def table(samples, tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("parquet"), samples)


@pytest.fixture(scope="module")
def mixed(samples, tmp_path_factory) -> Path:
    """The folder with images that cannot be used, here and there."""
    root = write_folder(tmp_path_factory.mktemp("mixed"), samples)
    for number in range(30):
        (root / LABELS[number % 10] / f"{7 * number:04d}-bad.png").write_bytes(b"bad")
    return root


@pytest.fixture(scope="module")
def undivided(mixed, tmp_path_factory):
    """What one process makes of it."""
    return prepare(mixed, tmp_path_factory.mktemp("undivided"))


class Dying:
    """An observer whose process is killed at its second report, the first time."""

    def __init__(self, factory: Callable[[], Observer], mark: Path) -> None:
        self._observer, self._mark = factory(), mark

    def sample_shard(self, shard, attempt, report, batch_limit):
        """Observe, or die."""
        reports = itertools.count()

        def deadly(num_tried: int) -> None:
            report(num_tried)
            if next(reports) == 1 and not self._mark.exists():
                self._mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        return self._observer.sample_shard(shard, attempt, deadly, batch_limit)


class Deadly(RayExecutor):
    """Ray, one of whose actors dies."""

    mark: Path

    def open(self, factory, num_shards):
        """With observers that die."""
        return super().open(partial(Dying, factory, self.mark), num_shards)


class Unlucky(LocalExecutor):
    """Threads of which the first ones fail to load their models."""

    num_failures = 0

    def open(self, factory, num_shards):
        """With a factory that fails."""
        left = list(range(self.num_failures))

        def fail():
            if left and left.pop() >= 0:
                raise ZeroDivisionError("no such kernel")
            return factory()

        return super().open(fail, num_shards)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["folder", "tars", "many tars", "table"])
def test_parts_are_the_whole_and_share_nothing(request, monkeypatch, mixed, tars, table, tmp_path, kind, num_parts):
    """Every finding is in one part, at its place; no part decodes what is another's; damage is told once."""
    if kind == "many tars":
        data = png(plain_image())
        for number in range(12):
            write_tar(tmp_path / f"{number:02d}.tar", [("a.png", data), ("a.cls", b"1"), ("b.png", data)])
        (tmp_path / "05.tar").write_bytes((tmp_path / "05.tar").read_bytes()[:1536])
    path = {"folder": mixed, "tars": tars, "many tars": tmp_path, "table": table}[kind]
    source, decoded = open_images(str(path), LABELS), []
    monkeypatch.setattr(image_source, "decode_rgb", lambda data: decoded.append(0) or decode_rgb(data))
    whole = list(source.read())
    num_decoded = len(decoded)
    parts = [list(source.read_part(part, num_parts)) for part in range(num_parts)]
    assert len(decoded) == 2 * num_decoded and [found for _, found in sorted_by_place(parts)] == whole
    assert num_parts > 3 or all(parts)


def sorted_by_place(parts):
    """What all parts found, in the order of the source."""
    return sorted((one for part in parts for one in part), key=lambda one: one[0])


@pytest.mark.slow
def test_actors_make_the_artefact_of_one_process_also_where_one_is_killed(cluster, mixed, undivided, tmp_path):
    """Byte for byte with the zoo's models, whoever saw which image; what is unusable is listed once, in order.

    Three of them, on two cores: one waits until another has gone. One is killed by SIGKILL in the middle of a part: a
    line says that the part begins again. Processes with other batches: what neither threads nor a test of the parts
    could show.
    """
    stream = io.StringIO()
    executor = Deadly(address=cluster.address, num_workers=3, device="cpu")
    executor.mark = tmp_path / "died"
    divided = prepare(mixed, tmp_path / "home", executor=executor, stream=stream)
    assert divided.path.name == undivided.path.name and same_bytes(divided.path, undivided.path)
    names = [one.name for one in divided.conditioning.unusable]
    assert names == sorted(names) and len(names) == 30
    assert "(3 worker" in stream.getvalue() and not executor._handles and executor.mark.exists()
    assert stream.getvalue().count("its part of the images begins again: the worker's process died") == 1


@pytest.mark.slow
def test_an_error_of_the_user_in_an_actor_is_one_line(cluster, mixed, tmp_path):
    """A torn model, which only the actors load: the words and the code of one process, nothing of Ray's."""
    target = Path(shutil.copytree(REPOSITORY / "engine/zoo/digits/classifier", tmp_path / "target"))
    (target / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes()[:1000])
    executor = RayExecutor(address=cluster.address, num_workers=1, device="cpu")
    with pytest.raises(RiskforgeError) as error:
        prepare(mixed, tmp_path / "home", changes=[("models.target", str(target))], executor=executor)
    with pytest.raises(JobError, match="cannot be loaded as a classifier") as here:
        prepare(mixed, tmp_path / "home", changes=[("models.target", str(target))])
    assert str(error.value) == str(here.value) and error.value.exit_code == EXIT_USER
    assert "\n" not in str(error.value) and not (tmp_path / "home").exists()


class Crashing(LocalExecutor):
    """Threads that stand for processes which die at their first part.

    Attributes:
        num_crashes: of how many parts in all.
        is_node_lost: whether with their machine.
    """

    num_crashes = 0
    is_node_lost = False

    def submit(self, worker, shard, attempt, batch_limit=0):
        """Lose the worker, or process the part."""
        if self.num_crashes:
            self.num_crashes -= 1
            self._events.put((worker, WorkerLost(worker, self.is_node_lost, "the worker's process died")))
        else:
            super().submit(worker, shard, attempt, batch_limit)


@pytest.mark.parametrize(("num_crashes", "is_node_lost"), [(1, False), (5, True)])
def test_lost_workers_are_replaced(mixed, undivided, tmp_path, num_crashes, is_node_lost):
    """A process once for a part, machines as often as they like."""
    executor, stream = Crashing(1), io.StringIO()
    executor.num_crashes, executor.is_node_lost = num_crashes, is_node_lost
    assert same_bytes(prepare(mixed, tmp_path, executor=executor, stream=stream).path, undivided.path)
    assert stream.getvalue().count("its part of the images begins again: the worker's process died") == num_crashes


def test_a_part_that_loses_two_processes_ends_the_pass(mixed, tmp_path):
    """One part, two processes: the third would fare no better."""
    executor = Crashing(1)
    executor.num_crashes = 2
    with pytest.raises(WorkersFailingError, match=r"2 workers were lost with the same part .*process died; nothing is"):
        prepare(mixed, tmp_path, executor=executor)
    assert not list(tmp_path.iterdir())


def test_a_defect_in_the_pass_ends_it_with_one_line(monkeypatch, mixed, tmp_path):
    """An exception that no user can cause is not tried again."""
    monkeypatch.setattr(Observer, "observe", lambda *arguments: 1 / 0)
    with pytest.raises(WorkersFailingError, match="the images failed on a worker: ZeroDivisionError: div"):
        prepare(mixed, tmp_path, executor=LocalExecutor(2))


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_worker_that_does_not_start_is_replaced_once(mixed, undivided, tmp_path, num_failures):
    """Then the pass ends with the last line of the reason and the code of what is unfinished, not in a loop."""
    executor = Unlucky(1)
    executor.num_failures = num_failures
    if num_failures == 1:
        assert same_bytes(prepare(mixed, tmp_path, executor=executor).path, undivided.path)
        return
    with pytest.raises(
        WorkersFailingError, match=r"do not start; .*: ZeroDivisionError: no such kernel; nothing"
    ) as end:
        prepare(mixed, tmp_path, executor=executor)
    assert end.value.exit_code == EXIT_INCOMPLETE and not list(tmp_path.iterdir())


def test_large_sets_are_divided_and_the_choice_is_told(monkeypatch, mixed, undivided, tars, tmp_path):
    """By their number of images, tars by their size; the artefact does not show which."""
    for data, limit, sizes in ((mixed, "LARGE_SET", (269, 270)), (tars, "LARGE_BYTES", (1, 10**9))):
        for size in sizes:
            monkeypatch.setattr("engine.studies.prepare.program." + limit, size)
            stream = io.StringIO()
            made = prepare(data, tmp_path, executor=LocalExecutor(2), only_large=True, stream=stream)
            assert data == tars or same_bytes(made.path, undivided.path)
            [line] = [line for line in stream.getvalue().splitlines() if " more than " in line]
            assert ("divided over Ray workers" in line) == (size == sizes[0]) == ("(2 workers)" in stream.getvalue())


def test_a_worker_that_sees_other_images_says_so(mixed, tmp_path):
    """A path that leads elsewhere on its machine, or nowhere, must not give half an artefact."""
    job, seen_by_driver = read_job(QUICKSTART, []), signature(open_images(str(mixed), LABELS))
    write_folder(tmp_path / "other", [(plain_image(), 3)])
    for data in (tmp_path / "other", tmp_path / "none"):
        with pytest.raises(JobError, match=f"{data}' as .* sees it is not what the driver sees"):
            load_part_observer(job, str(data), "zoo:digits/clip", folder=str(Path.cwd()), like=seen_by_driver)


@pytest.mark.slow
def test_an_interrupt_ends_the_actors(cluster, mixed, tmp_path):
    """Ctrl-C while they look at images: the code for later, nothing stored, no process of theirs left."""
    options = ["--data", "digits:test-single", "--output", str(tmp_path / "home"), "--set", "runtime.device=cpu"]
    process = commands.start(
        "prepare", QUICKSTART, *options, "--workers", 2, "--address", cluster.address, folder=tmp_path
    )
    for line in process.stderr:
        if "/7287 images" in line:
            break
    wait_until(lambda: num_actors() == 2, "both actors are there, and those of other tests have gone")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=400)
    assert process.returncode == EXIT_DRAINED and "nothing is stored" in rest and "Traceback" not in rest
    wait_until(lambda: not num_actors(), "no actor is left")
    assert not (tmp_path / "home").exists()


def num_actors() -> int:
    """Actors of the cluster that this process has started."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()[1:]]
    ours = {pid for pid, parent, _ in rows if parent == str(os.getpid())}
    return sum(parent in ours and "ray::RayHost" in args for _, parent, args in rows)
