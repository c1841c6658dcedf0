"""The list of mutations and its runner."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from forked_tests import TestServer
from mutate import REPOSITORY, Mutation, copy_repository, outcome, outcome_of, page, read_mutations, run_tests

from tests.conftest import REPOSITORY as ROOT

MUTATIONS = read_mutations()
# What a test of scores imports, and a quick one of them.
LIBRARIES = ("pytest", "pytest_timeout", "_hypothesis_pytestplugin", "hypothesis.strategies", "torch")
QUICK = "tests/test_scores.py::test_half_precision_logits_are_scored_in_float32"


@cache
def text_of(file: str) -> str:
    """A file of the repository, which many mutations are in or name."""
    return (REPOSITORY / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("area", sorted({mutation.area for mutation in MUTATIONS}))
def test_each_mutation_changes_the_code_and_names_its_tests(area: str) -> None:
    """A list that the code has moved away from would catch nothing. All that is wrong is named at once."""
    problems = []
    for mutation in (mutation for mutation in MUTATIONS if mutation.area == area):
        if text_of(mutation.file).count(mutation.old) != 1 or mutation.old == mutation.new or not mutation.tests:
            problems.append(f"{mutation.file}: {mutation.old!r}")
        problems += [test for test in mutation.tests if not is_there(test)]
    assert not problems


def is_there(test: str) -> bool:
    """Whether a test, or a file of tests, exists."""
    file, _, name = test.partition("::")
    return (REPOSITORY / file).is_file() and (not name or f"\ndef {name}(" in text_of(file))


def test_the_list_covers_every_area() -> None:
    assert len(MUTATIONS) >= 150
    packages = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert {one.file.split("/")[1] for one in MUTATIONS} >= packages


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TestServer]]:
    """A copy of the repository with a server."""
    root = tmp_path_factory.mktemp("copy")
    copy_repository(root)
    server = TestServer(root, LIBRARIES)
    yield root, server
    server.close()


@pytest.mark.slow
def test_a_mistake_is_caught_and_a_comment_survives(copy: tuple[Path, TestServer]) -> None:
    """The copy runs its own code, not the installed one nor that of the mutation before, and is whole afterwards."""
    root, server = copy
    wrong = Mutation(
        area="scores", file="engine/methods/scores.py", tests=(QUICK,),
        old="return 0.0 - _log_softmax", new="return 0.0 + _log_softmax",
    )  # fmt: skip
    before = (root / wrong.file).read_text()
    same = Mutation(area="scores", file=wrong.file, old=before[:40], new=before[:40] + " ", tests=wrong.tests)
    broken = Mutation(area="scores", file=wrong.file, old="import math\n", new="import math(\n", tests=wrong.tests)
    ends = [outcome_of(mutation, root, server) for mutation in (wrong, broken, same)]
    assert [outcome(end) for end in ends] == ["caught", "caught", "survived"]
    assert ends[0].failed[0].startswith(QUICK)
    assert (root / wrong.file).read_text() == before
    with pytest.raises(ValueError, match="no test is selected"):
        run_tests(server, [QUICK, "--deselect=tests/test_scores.py"])


@pytest.mark.slow
def test_what_hangs_is_ended_with_all_that_it_started(copy: tuple[Path, TestServer]) -> None:
    """Also a process in a session of its own; the server goes on."""
    root, server = copy
    test = root / "tests/test_hanging.py"
    test.write_text(
        "import subprocess, time\n"
        "def test_hangs():\n"
        f"    started = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        f"    open({str(root / 'started')!r}, 'w').write(str(started.pid))\n"
        "    time.sleep(1000)\n"
    )
    end = server.run(["tests/test_hanging.py"], seconds=5)
    assert outcome(end) == "caught" and not Path("/proc", (root / "started").read_text()).exists()
    assert server.run([QUICK]) == (0, [])


def test_the_record_counts_by_area_and_names_survivors() -> None:
    first, second = (
        Mutation(area="a", file="f", old=f"old\n {name}", new="new", tests=("t",), survives="Equal.") for name in "xy"
    )
    text = page([(first, "caught"), (second, "survived")], 61.0, "shared")
    assert "| a | 2 | 1 (50.0%) | 1 |\n| **all** | 2 | 1 (50.0%) | 1 |" in text and "1 minutes (shared)" in text
    assert text.endswith("- `f`: `old y` as `new`. Equal.\n")
