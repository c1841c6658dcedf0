"""The list of mutations and its runner."""

import pytest
from mutate import REPOSITORY, Mutation, copy_repository, outcome_of, page, read_mutations

from tests.conftest import REPOSITORY as ROOT

MUTATIONS = read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{one.area}-{number}" for number, one in enumerate(MUTATIONS)])
def test_each_mutation_changes_the_code_and_names_its_tests(mutation: Mutation) -> None:
    """A list that the code has moved away from would catch nothing."""
    assert (REPOSITORY / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new and mutation.tests
    assert all((REPOSITORY / name.partition("::")[0]).is_file() for name in mutation.tests)


def test_the_list_covers_every_area() -> None:
    assert len(MUTATIONS) >= 150
    packages = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert {one.file.split("/")[1] for one in MUTATIONS} >= packages


@pytest.mark.slow
def test_a_mistake_is_caught_and_a_comment_survives(tmp_path) -> None:
    """The copy runs its own code, not the installed one, and is whole again afterwards."""
    copy_repository(tmp_path)
    wrong = Mutation(
        area="scores", file="engine/methods/scores.py", tests=("tests/test_scores.py",),
        old="return 0.0 - _log_softmax", new="return 0.0 + _log_softmax",
    )  # fmt: skip
    before = (tmp_path / wrong.file).read_text()
    same = Mutation(area="scores", file=wrong.file, old=before[:40], new=before[:40] + " ", tests=wrong.tests)
    assert [outcome_of(one, tmp_path) for one in (wrong, same)] == ["caught", "survived"]
    assert (tmp_path / wrong.file).read_text() == before
    assert "| **all** | 2 | 1 (50%) | 1 |" in page([(wrong, "caught"), (same, "survived")], 60.0)
