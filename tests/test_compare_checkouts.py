"""The comparison of two checkouts: it must pass where nothing changed, and notice every kind of change."""

import shutil
import textwrap
from pathlib import Path

import compare_checkouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checkouts.facts import UNSTABLE_COLUMNS, compare_facts, folder_facts
from checkouts.steps import choose_jobs

from engine.job.columns import RUN_COLUMNS
from tests.conftest import REPOSITORY
from tests.job_cases import STUDY_JOBS

TINY = {
    "name": "tiny",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion",
        "clip": "zoo:digits/clip",
        "target": "zoo:digits/classifier",
    },
    "requests": [{"name": "one", "method": "prompt", "classes": ["three"], "count": 1}],
    "sampling": {"num_inference_steps": 2},
    "output": {"uri": "runs/tiny"},
}
# The command line of a checkout without models; `{seed}` decides the bytes of its tars.
FAKE_COMMANDS = """
    import json, pathlib, shutil, sys

    BYTES = b"image {seed}" * 100

    def console():
        command, *arguments = sys.argv[1:]
        run = pathlib.Path("run")
        tar = run / "shards/tiny-000000.tar"
        if command == "run":
            tar.parent.mkdir(parents=True, exist_ok=True)
            if not tar.exists():
                tar.write_bytes(BYTES)
        elif command == "export":
            shutil.copytree(run, arguments[arguments.index("--output") + 1])
        elif command == "verify":
            if tar.stat().st_size != len(BYTES):
                sys.exit(1)
        elif command == "repair":
            tar.unlink()
        print(json.dumps([command]))
"""
FAKE_PACKAGE = """
    class Corpus:
        samples = columns = labels = ()
        filter = to_table = lambda self, *_: self
        to_torch = to_pylist = lambda self: []
        __len__ = lambda self: 0

    open_run = lambda uri: Corpus()
"""


@pytest.fixture
def make_checkout(tmp_path):
    """Makes a checkout with the tiny job, whose commands need no models."""

    def make(name: str, *, seed: int = 0, change: tuple[str, str] = ("", "")) -> Path:
        checkout = tmp_path / name
        write_job(checkout)
        (checkout / "engine").mkdir()
        (checkout / "engine/__init__.py").write_text(textwrap.dedent(FAKE_PACKAGE))
        commands = textwrap.dedent(FAKE_COMMANDS).replace("{seed}", str(seed))
        assert change[0] in commands
        (checkout / "engine/cli.py").write_text(commands.replace(*change) if change[0] else commands)
        return checkout

    return make


def write_job(checkout: Path) -> None:
    """The tiny job as the only one of a checkout, and the name of its command."""
    (checkout / "jobs").mkdir(parents=True)
    (checkout / "jobs/tiny.yaml").write_text(yaml.safe_dump(TINY))
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)


def facts(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """The facts of a folder as a phase of their own."""
    kinds: dict[str, dict[str, str]] = {}
    for kind, name, fact in folder_facts(folder, folder):
        kinds.setdefault(kind, {})[name] = fact
    return {"run": kinds}


def write_run(folder: Path, table: pa.Table, *, tar: bytes = b"tar", plan: str = "{}") -> None:
    """A folder like that of a run."""
    (folder / "_state/plan").mkdir(parents=True)
    (folder / "_state/plan/000000.json").write_text(plan)
    (folder / "manifest.json").write_text('{"plan_digest": "d", "timing": {"finished": 1.0}, "dials": {}}')
    (folder / "run.tar").write_bytes(tar)
    pq.write_table(table, folder / "rows.parquet")


ROWS = pa.table(
    {"risk": [0.1, 0.2], "key": ["a", "b"], "worker": ["x", "x"]},
    schema=pa.schema(
        [pa.field("risk", pa.float64(), False, {"description": "r"}), ("key", pa.string()), ("worker", pa.string())]
    ),
)
LAST_BIT = pa.array([0.1, 0.2 + 2**-54])


@pytest.mark.parametrize(
    ("kinds", "table", "more"),
    [
        (set(), ROWS.set_column(2, "worker", [["y", "z"]]), {}),
        ({"columns", "schemas"}, ROWS.append_column("new", [[1, 2]]), {}),
        ({"schemas"}, ROWS.select(["key", "risk", "worker"]), {}),
        ({"schemas"}, ROWS.replace_schema_metadata({"version": "4"}), {}),
        ({"schemas"}, ROWS.cast(ROWS.schema.set(0, ROWS.schema.field(0).with_metadata({"description": "s"}))), {}),
        ({"columns"}, ROWS.set_column(0, ROWS.schema.field(0), LAST_BIT), {}),
        ({"columns"}, ROWS.take([1, 0]), {}),
        ({"tars"}, ROWS, {"tar": b"tar "}),
        ({"plans"}, ROWS, {"plan": "{ }"}),
    ],
)
def test_every_change_of_a_run_is_noticed_and_nothing_else(tmp_path, kinds, table, more):
    """Sees a kind of fact that is not compared, and run-dependent columns that are."""
    write_run(tmp_path / "before", ROWS)
    write_run(tmp_path / "after", table, **more)
    compared = list(compare_facts("job", facts(tmp_path / "before"), facts(tmp_path / "after")))
    assert {row.kind for row in compared} == {"files", "plans", "records", "job digests", "tars", "schemas", "columns"}
    assert {row.kind for row in compared if row.num_different} == kinds
    assert all(bool(row.first) == bool(row.num_different) for row in compared)


def test_a_missing_file_is_a_difference(tmp_path):
    write_run(tmp_path / "before", ROWS)
    write_run(tmp_path / "after", ROWS)
    (tmp_path / "after/run.tar").unlink()
    compared = compare_facts("job", facts(tmp_path / "before"), facts(tmp_path / "after"))
    assert {row.kind: row.first for row in compared if row.num_different} == {
        "files": "run.tar: only in BEFORE",
        "tars": "run.tar: only in BEFORE",
    }


def test_columns_that_are_left_out_are_those_that_depend_on_the_run():
    """Sees a column that became run-dependent or ceased to be; the digest of an image file is compared."""
    assert set(UNSTABLE_COLUMNS) == {column.name for column in RUN_COLUMNS} - {"sha256"}


def test_jobs_of_this_repository_are_compared_or_left_out_with_a_reason():
    """Sees overrides of requests that a job no longer has, as well as a job that is lost silently."""
    jobs, left_out = choose_jobs(REPOSITORY, None, whole=False, runs_only=False)
    assert {job.name for job in jobs} | set(left_out) == {path.stem for path in REPOSITORY.glob("jobs/*.yaml")}
    studies = {path.stem: "is a study" for path in STUDY_JOBS}
    photographs = "starts from images that are not in the repository: runs/cifar10-photographs"
    gpu = dict.fromkeys(("imagenet-kldb", "imagenet-riskydiff"), "needs a GPU")
    assert left_out == studies | gpu | dict.fromkeys(("counterfactuals-cifar10", "valid-cifar10"), photographs)


@pytest.mark.parametrize(
    ("options", "changed", "code", "message"),
    [
        ([], {}, 0, "equal: "),
        ([], {"seed": 1}, 1, "different: tiny, own run, tars: run: shards/tiny-000000.tar"),
        (["--runs-only"], {"change": ("tar.unlink()", "pass")}, 0, "equal: "),
        ([], {"change": ("tar.unlink()", "pass")}, 1, "resume after repair: shards/tiny-000000.tar"),
        ([], {"change": ("sys.exit(1)", "sys.exit(0)")}, 1, "verify the damage: BEFORE has '1', AFTER '0'"),
        ([], {"change": ("[command]", "[command, 1]")}, 1, "tiny, own run, --json: plan: "),
    ],
)
def test_a_checkout_that_behaves_differently_fails(make_checkout, capsys, options, changed, code, message):
    """Sees a comparison that runs the same checkout twice, and one that forgets what is done with the run of BEFORE."""
    before, after = make_checkout("before"), make_checkout("after", **changed)
    assert compare_checkouts.main([str(before), str(after), *options]) == code
    assert message in capsys.readouterr().out


def test_results_of_before_are_reused_while_its_code_is_the_same(make_checkout, tmp_path, capsys):
    before, after = make_checkout("before"), make_checkout("after")
    command = [str(before), str(after), "--runs-only", "--keep", str(tmp_path / "kept")]
    for is_reused in (False, True):
        assert compare_checkouts.main(command) == 0
        assert ("results are reused" in capsys.readouterr().err) == is_reused
    path = before / "engine/cli.py"
    # Of another length: bytecode is recognised by second and size.
    path.write_text(path.read_text().replace("image 0", "image 10"))
    assert compare_checkouts.main(command) == 1


def test_a_reference_that_fails_is_an_error_of_its_own(make_checkout, capsys):
    broken = make_checkout(
        "before", change=('if command == "run":', 'if command == "run":\n        sys.exit("broken")')
    )
    assert compare_checkouts.main([str(broken), str(make_checkout("after"))]) == 2
    assert "`run` ends with exit code 1 in BEFORE: broken" in capsys.readouterr().err


@pytest.mark.slow
def test_another_seed_is_noticed_in_a_real_run(tmp_path, capsys):
    """The engine itself, compared with a copy of it that draws other seeds."""
    before, after = tmp_path / "before", tmp_path / "after"
    for checkout in (before, after):
        write_job(checkout)
        shutil.copytree(REPOSITORY / "engine", checkout / "engine", ignore=shutil.ignore_patterns("zoo"))
        (checkout / "engine/zoo").symlink_to(REPOSITORY / "engine/zoo")
    changed = [path for path in sorted((after / "engine").rglob("*.py")) if "def sample_seed(" in path.read_text()]
    assert len(changed) == 1
    text = changed[0].read_text()
    assert text.count("sorted(classes), index]") == 1
    changed[0].write_text(text.replace("sorted(classes), index]", "sorted(classes), index + 1]"))
    command = [str(before), str(after), "--runs-only", "--keep", str(tmp_path / "kept")]
    assert compare_checkouts.main(command) == 1
    output = capsys.readouterr().out
    lines = {line.split()[3]: line for line in output.splitlines() if line.split()[:1] == ["tiny"]}
    assert "DIFFERENT" in lines["tars"] and "DIFFERENT" in lines["columns"]
    assert all("equal" in lines[kind] for kind in ("plans", "schemas", "exit"))
