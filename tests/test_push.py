"""`riskforge push`: what arrives is what the run holds, once, whatever breaks, and nothing of others is touched.

Against a server that checks each request as the Hub's protocol has it. The pushes are those of the command; the one
that is killed is a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from engine.data.publishing.contents import Contents, PushedFile, read_contents
from engine.data.publishing.hub_card import matches
from engine.data.publishing.limits import limit_warnings
from engine.data.publishing.private_text import PrivatePlaces
from engine.data.publishing.push import commit_batches
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.run.repair import repair
from engine.data.run.schema import tar_features
from engine.data.stores.opening import open_store
from engine.job.columns import SCHEMA_VERSION
from tests.conftest import REPOSITORY
from tests.corpus_cases import make_run
from tests.hub_server import OWNER, TOKEN, Fault, HubServer
from tests.run_cases import LABELS

TO = f"hf://datasets/{OWNER}"
PRIVATE = "/srv/private models/secret-clip"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of four shards, of a model in a folder of this machine."""
    folder = make_run(tmp_path_factory.mktemp("push") / "run", count=12)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["models"]["clip"]["address"] = PRIVATE
    (folder / "manifest.json").write_text(json.dumps(manifest))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("zoo:digits/clip", PRIVATE))
    (folder / "report.html").write_text(f"<p>{PRIVATE}</p></html>")
    (folder / "notes.txt").write_text("mine")
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in (folder / "shards").glob("*.tar")}


def test_a_run_arrives_once(call, hub: HubServer, run: Path) -> None:
    """Privately, with its tars byte for byte, its card and marker; the second push sends nothing."""
    code, out, _ = call("push", run, "--to", f"{TO}/demo")
    tree = hub.tree("demo")
    assert code == 0 and "(private)" in out and hub.repos[f"{OWNER}/demo"].private
    assert {name: data for name, data in tree.items() if name.endswith(".tar")} == tars(run)
    wanted = ["README.md", "_SUCCESS", "manifest.json", "metadata.parquet", "shards/_info.json", "shards/surplus.txt"]
    assert sorted(tree) == sorted([*wanted, "shards/wids.json", *tars(run)])
    *_, (_, _, last) = hub.repos[f"{OWNER}/demo"].commits
    assert last[-1] == "_SUCCESS" and not any(name.endswith(".tar") for name in last)
    num_writes = len(hub.writes())
    code, out, _ = call("push", run, "--to", f"{TO}/demo", "--public")
    assert code == 0 and "nothing new" in out and "is private and stays so" in out
    assert len(hub.writes()) == num_writes and set(hub.puts.values()) == {1}


def test_nothing_that_is_pushed_names_the_machine(call, hub: HubServer, run: Path, tmp_path: Path) -> None:
    """Not the folder of the run, not that of a model, no worker; the rows are the same otherwise."""
    assert call("push", run, "--to", f"{TO}/demo", "--with-report")[0] == 0
    tree = hub.tree("demo")
    for name, data in tree.items():
        assert str(run.parent).encode() not in data and PRIVATE.encode() not in data, name
    assert "…/secret-clip" in tree["README.md"].decode() and b"\xe2\x80\xa6/secret-clip" in tree["report.html"]
    folder = tmp_path / "pulled"
    for name, data in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    pushed, own = pq.read_table(folder / "metadata.parquet"), pq.read_table(run / "metadata.parquet")
    assert set(own["worker"].to_pylist()) == {"w0"} and set(pushed["worker"].to_pylist()) == {"w1"}
    # What was pulled is pushed again as it is.
    assert call("push", folder, "--to", f"{TO}/again", "--with-report")[0] == 0 and hub.tree("again") == tree
    assert pushed.drop(["worker"]).equals(own.drop(["worker"])) and pushed.schema.equals(
        own.schema, check_metadata=True
    )


@pytest.mark.parametrize("version", [1, 3, SCHEMA_VERSION])
def test_runs_of_every_version_have_their_types_on_the_hub(tmp_path: Path, version: int) -> None:
    """Cards of the first versions declared none; what a user wrote into the card stays."""
    folder = make_run(tmp_path / "run", version=version, count=2)
    card = (folder / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    (folder / "README.md").write_text(f"---\nlicense: cc-by-4.0\n# mine\n---\n{body}")
    contents = read_contents(open_store(str(folder)), tmp_path)
    pushed = next(file.content for file in contents.closing if file.name == "README.md")
    assert isinstance(pushed, bytes) and pushed.decode().endswith(body) and b"license: cc-by-4.0\n# mine\n" in pushed
    header = yaml.safe_load(pushed.decode().split("---\n")[1])
    assert header["dataset_info"]["features"] == tar_features("png", version, LABELS)
    assert contents.patterns == ["shards/*.tar"]
    (folder / "README.md").write_text(card)
    again = read_contents(open_store(str(folder)), tmp_path)
    assert next(file.content for file in again.closing if file.name == "README.md") == card.encode()


READ_BACK = """
import sys, datasets, huggingface_hub, engine
datasets.disable_progress_bars()
for name in sys.argv[1:]:
    rows = list(datasets.load_dataset(name, split="train"))
    print(name, len(rows), *sorted({type(row.get("png") or row["image"]).__name__ for row in rows}), sep="|")
folder = huggingface_hub.snapshot_download(sys.argv[1], repo_type="dataset")
print(len(engine.open_run(folder).samples), engine.open_run(folder).runs[0].state)
"""


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    kinds = ("webdataset", "imagefolder", "parquet")
    return {
        kind: export((str(run),), ExportOptions(output=str(folder / kind), format=kind, samples_per_shard=10)).path
        for kind in kinds
    }


def test_readers_read_from_the_hub_what_was_pushed(
    call, hub: HubServer, run: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    """`datasets.load_dataset` and `snapshot_download`, of a run and of an export of every kind."""
    counts = {}
    for name, folder in {"demo": run, **exports}.items():
        options = ["--public"] if name == "parquet" else []
        assert call("push", folder, "--to", f"{TO}/{name}", *options)[0] == 0
        assert hub.repos[f"{OWNER}/{name}"].private == (name != "parquet")
        manifest = json.loads((folder / "manifest.json").read_text())["counts"]
        counts[name] = manifest.get("images") or manifest["samples"]["ok"] + manifest["samples"]["rejected"]
        assert str(run.parent).encode() not in b"".join(hub.tree(name).values())
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", READ_BACK, *(f"{OWNER}/{name}" for name in counts)]
    read = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    *loaded, opened = read.stdout.splitlines() or [read.stderr]
    assert loaded == [f"{OWNER}/{name}|{count}|PngImageFile" for name, count in counts.items()], read.stderr
    assert opened == f"{counts['parquet']} finished"


TROUBLES = {
    "errors": [
        Fault(r"PUT /lfs/"),
        Fault(r"PUT /lfs/", skip=1, status=500, times=2),
        Fault(r"POST .*/preupload/", status=503),
        Fault(r"POST .*objects/batch", status=429, headers={"Retry-After": "0"}),
        Fault(r"POST .*/commit/", status=500),
        Fault(r"POST .*/commit/", status=412, skip=1, message="A commit has happened since. Please refresh."),
        Fault(r"GET .*/tree/", status=502),
    ],
    "lost answers": [
        Fault(r"POST /api/repos/create", is_served=True),
        Fault(r"POST .*/commit/", is_served=True),
        Fault(r"POST .*/commit/", status=504, is_served=True),
    ],
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_passes_is_tried_again(call, hub: HubServer, run: Path, trouble: str) -> None:
    """Broken connections, errors of the server, limits of rates, lost answers: no object and no commit twice."""
    hub.faults += [replace(fault) for fault in TROUBLES[trouble]]
    code, _, errors = call("push", run, "--to", f"{TO}/demo")
    assert code == 0 and [fault.times for fault in hub.faults] == [0] * len(hub.faults), errors
    assert tars(run).items() <= hub.tree("demo").items() and "_SUCCESS" in hub.tree("demo")
    assert set(hub.puts.values()) == {1} and len(hub.repos[f"{OWNER}/demo"].commits) == 2


def test_what_stays_ends_resumable(call, hub: HubServer, run: Path) -> None:
    """Exit code 75 and the remedy; the same command sends only what the Hub does not have."""
    hub.faults.append(Fault(r"POST .*/commit/", status=503, times=99))
    code, _, errors = call("push", run, "--to", f"{TO}/demo")
    assert code == 75 and "503" in errors and "the same command continues" in errors
    hub.faults.clear()
    before = dict(hub.puts)
    assert before and call("push", run, "--to", f"{TO}/demo")[0] == 0
    assert set(hub.puts.values()) == {1} and before.items() <= hub.puts.items()
    hub.clear()
    hub.faults.append(Fault(r"GET /api/datasets", status=429, headers={"Retry-After": "3600"}))
    assert call("push", run, "--to", f"{TO}/demo")[0] == 75


def test_a_killed_push_continues(call, hub: HubServer, run: Path) -> None:
    """SIGKILL of the process within an upload, then the same command: each object came once."""
    pids: list[int] = []
    hub.faults.append(Fault(r"PUT /lfs/", skip=1, act=lambda: os.kill(pids[0], signal.SIGKILL)))
    pids.append(os.fork())
    if not pids[0]:
        with contextlib.suppress(BaseException):
            call("push", run, "--to", f"{TO}/demo")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == -signal.SIGKILL and hub.tree("demo") == {}
    assert call("push", run, "--to", f"{TO}/demo")[0] == 0 and tars(run).items() <= hub.tree("demo").items()
    assert set(hub.puts.values()) == {1}


REFUSALS = {
    "HF_TOKEN": [Fault(r"GET /api/datasets", status=401, message="Invalid credentials in Authorization header")],
    "write access": [Fault(r"POST /api/repos", status=403, message="You don't have the rights")],
    "no such repository": [Fault(r"POST .*/preupload", status=404)],
    "conflict": [Fault(r"POST .*/commit", status=409, message="conflict")],
    "too large": [Fault(r"POST .*/commit", status=413, message="too large")],
    "nothing here": [Fault(r"PUT /lfs", status=403, message="nothing here")],
}


@pytest.mark.parametrize("said", REFUSALS)
def test_what_the_hub_refuses_is_said_in_a_line(call, hub: HubServer, run: Path, said: str) -> None:
    """With exit code 2, once, and without the token."""
    hub.faults += [Fault(one.request, 99, status=one.status, message=one.message) for one in REFUSALS[said]]
    code, out, errors = call("push", run, "--to", f"{TO}/demo")
    *_, line = errors.strip().splitlines()
    assert code == 2 and line.startswith(f"error: --to {TO}/demo: ") and said in line and TOKEN not in out + errors


def test_tokens(call, hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, a wrong one and one that no header can hold are one sentence each; none is printed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for token, said in (("", "there is no token"), ("hf_wrong", "refuses the token"), ("hf_wröng", "HF_TOKEN")):
        monkeypatch.setenv("HF_TOKEN", token)
        code, _, errors = call("push", run, "--to", f"{TO}/demo")
        assert code == 2 and said in errors and "HF_TOKEN" in errors and errors.count("\n") <= 2
        assert not token or token not in errors
    monkeypatch.setenv("HF_TOKEN", "")
    code, out, _ = call("push", run, "--to", f"{TO}/demo", "--dry-run")
    assert code == 0 and "there is no token" in out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, errors = call("push", run, "--to", f"{TO}/demo")
    assert code == 2 and "HF_HUB_OFFLINE=1" in errors and not hub.repos


@pytest.mark.parametrize(
    "to, said",
    [
        ("hf://models/ada/x", "a repository of models"),
        ("hf://spaces/ada/x", "a repository of spaces"),
        ("hf://ada/x", "a repository of models"),
        ("hf://datasets/x", "lacks the user"),
        ("hf://datasets/ada/x/y", "a folder in a repository"),
        ("hf://datasets/ada/..x", "is not a name on the Hub"),
        ("hf://datasets/ada/x--y", "is not a name on the Hub"),
        ("s3://bucket/x", "s3:// is not supported"),
        ("ada/x", "has no scheme"),
        ("https://huggingface.co/datasets/ada/x", "write hf://datasets/ada/x"),
    ],
)
def test_addresses_that_nothing_is_pushed_to(call, run: Path, to: str, said: str) -> None:
    code, _, errors = call("push", run, "--to", to)
    assert code == 2 and said in errors and f"--to {to}" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("revision", ["", "a b", "refs/pr/1", "0" * 40, "../x", "-x"])
def test_revisions_that_are_no_branch(call, run: Path, revision: str) -> None:
    code, _, errors = call("push", run, "--to", f"{TO}/demo", f"--revision={revision}")
    assert code == 2 and "--revision" in errors


def test_branches_and_messages(call, hub: HubServer, run: Path) -> None:
    """A new branch is made from the main one, which stays as it is."""
    hub.add("demo", private=False, files={"LICENSE": b"mine"})
    code, out, _ = call("push", run, "--to", f"{TO}/demo", "--revision", "night/2", "--message", "Tonight's")
    assert code == 0 and "is public already" in out and "which stay: 'LICENSE'" in out and "/tree/night/2" in out
    assert hub.tree("demo") == {"LICENSE": b"mine"} and "_SUCCESS" in hub.tree("demo", "night/2")
    commits = hub.repos[f"{OWNER}/demo"].commits
    assert [(branch, message) for branch, message, _ in commits] == [("night/2", "Tonight's")] * 2


def test_a_dry_run_changes_nothing(call, hub: HubServer, run: Path) -> None:
    """Files, bytes, repository, privacy and what is there are said; the Hub gets no request that writes."""
    code, out, _ = call("push", run, "--to", f"{TO}/demo", "--dry-run", "--public")
    assert code == 0 and "would be made, public" in out and "nothing is sent" in out and "not pushed" in out
    assert all(name in out for name in ("README.md", *tars(run))) and max(map(len, out.splitlines())) <= 100
    tar = min(tars(run))
    hub.add("demo", files={tar: tars(run)[tar], "LICENSE": b"mine"})
    document = json.loads(call("push", run, "--to", f"{TO}/demo", "--dry-run", "--json")[1])
    assert document["private"] is True and document["is_new"] is False and document["kept"] == ["LICENSE"]
    assert document["there"] == {"files": 1, "bytes": len(tars(run)[tar])}
    assert tar not in [file["name"] for file in document["files"]] and "report.html" in document["not_pushed"]
    assert hub.writes() == []


def test_a_grown_run_replaces_what_it_changed(call, hub: HubServer, tmp_path: Path) -> None:
    """The same run with more samples: new shards, other documents; a card that was edited there is not lost."""
    folder = make_run(tmp_path / "run", count=4)
    assert call("push", folder, "--to", f"{TO}/demo")[0] == 0
    early = hub.tree("demo")
    shutil.rmtree(folder)
    make_run(folder, count=40)
    hub.repos[f"{OWNER}/demo"].branches["main"]["README.md"] = (early["README.md"] + b"mine", False)
    code, _, errors = call("push", folder, "--to", f"{TO}/demo")
    assert code == 2 and "('README.md')" in errors and "--overwrite" in errors
    hub.repos[f"{OWNER}/demo"].branches["main"]["README.md"] = (early["README.md"], False)
    assert call("push", folder, "--to", f"{TO}/demo")[0] == 0
    tree = hub.tree("demo")
    assert {name for name in tree if name.endswith(".tar")} == set(tars(folder)) > {"shards/demo-000000.tar"}
    assert tree["README.md"] != early["README.md"]


def test_content_of_others_is_not_replaced(call, hub: HubServer, run: Path, exports: dict[str, Path]) -> None:
    """Refused by name; with --overwrite replaced, and the data of the earlier push that would mix in goes."""
    hub.add("demo", files={"README.md": b"---\nlicense: mit\n---\n"})
    code, _, errors = call("push", run, "--to", f"{TO}/demo")
    assert code == 2 and "README.md" in errors and hub.writes() == []
    hub.add("demo", files={"shards/theirs.tar": b"x", "LICENSE": b"mine"})
    code, _, errors = call("push", run, "--to", f"{TO}/demo", "--overwrite")
    assert code == 2 and "('shards/theirs.tar')" in errors and "read as data" in errors
    del hub.repos[f"{OWNER}/demo"]
    assert call("push", exports["webdataset"], "--to", f"{TO}/demo")[0] == 0
    code, _, errors = call("push", run, "--to", f"{TO}/demo")
    assert code == 2 and "other content" in errors
    code, out, errors = call("push", run, "--to", f"{TO}/demo", "--overwrite")
    assert code == 0 and "which go: 'shards/corpus-000000.tar'" in out, errors
    assert {name for name in hub.tree("demo") if name.endswith(".tar")} == set(tars(run))
    assert "classes.json" in hub.tree("demo")


def test_incomplete_and_damaged_ones_are_refused(
    call, hub: HubServer, run: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    """With the command that helps, and before the Hub is written to where listings tell."""

    def refused(folder: Path, *said: str) -> None:
        code, _, errors = call("push", folder, "--to", f"{TO}/demo")
        assert code == 2 and all(word in errors for word in said), errors

    refused(make_run(tmp_path / "part", count=12, num_shards=1, finish=False), "not complete: 1 of", "`riskforge run`")
    refused(tmp_path / "none", "there is no folder")
    (tmp_path / "model").mkdir()
    refused(tmp_path / "model", "holds no run and no export")
    for damage, said in (
        ("shards/demo-000001.tar", "riskforge repair"),
        ("metadata.parquet", "writes the files again"),
    ):
        copy = tmp_path / damage.replace("/", "-")
        shutil.copytree(run, copy)
        (copy / damage).write_bytes((copy / damage).read_bytes()[:-9])
        refused(copy, damage, said)
    for kind, damage in {
        "webdataset": "corpus-000000.tar",
        "imagefolder": "*/*.png",
        "parquet": "train-*-of-*",
    }.items():
        copy = tmp_path / kind
        shutil.copytree(exports[kind], copy)
        next(copy.rglob(damage)).unlink()
        refused(copy, "damaged", "make the data set again")
    assert hub.writes() == []
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    tar = changed / "shards/demo-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    refused(changed, "demo-000001.tar", "riskforge verify")
    assert "_SUCCESS" not in hub.tree("demo") and "shards/demo-000001.tar" not in hub.tree("demo")
    assert repair(open_store(str(changed))).actions


def test_a_gitignore_there_is_noticed(call, hub: HubServer, run: Path) -> None:
    """The Hub leaves such files out without an error."""
    hub.add("demo", files={".gitignore": b"*.parquet\n"})
    code, _, errors = call("push", run, "--to", f"{TO}/demo")
    assert code == 2 and "metadata.parquet" in errors and ".gitignore" in errors


def test_a_card_that_the_hub_refuses(call, hub: HubServer, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    card = copy / "README.md"
    card.write_text(re.sub(r"(?m)^license: .*$", "license: nonsense", card.read_text()))
    code, _, errors = call("push", copy, "--to", f"{TO}/demo")
    assert code == 2 and '"license" must be one of' in errors and hub.writes() == []
    card.write_text("---\n{\n---\n")
    assert "its header is not YAML" in call("push", copy, "--to", f"{TO}/demo")[2]


def test_limits_of_the_hub_are_said_by_name() -> None:
    """Folders with too many files, files that are too large; commits are few enough for the Hub, and of all files."""
    sizes = {f"shards/night-{number:06d}.tar": 10**6 for number in range(10_001)} | {"shards/huge.tar": 60 * 10**9}
    data = [PushedFile(name=name, num_bytes=size) for name, size in sizes.items()]
    contents = Contents(store=None, name="", digest="", data=data, closing=[], left_out=[], patterns=[])  # type: ignore[arg-type]
    huge, folder = limit_warnings(contents)
    assert huge.startswith("shards/huge.tar has 60 GB") and folder.startswith("shards/ would hold 10,002 files")
    batches = list(commit_batches(data))
    assert [file for batch in batches for file in batch] == data and len(batches) == 101
    assert max(map(len, batches)) == 101 and [len(batch) for batch in commit_batches(data[:120])] == [50, 50, 20]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/ann/models/cnn", "…/cnn"),
        ("s3://secret-bucket/models/cnn", "…/cnn"),
        ("~/cnn", "…/cnn"),
        ("../cnn/", "…/cnn"),
        ("file:///srv/my models/cnn", "…/cnn"),
        ("cannot read /home/ann/a.png (no permission)", "cannot read …/a.png (no permission)"),
        ("zoo:digits/clip", "zoo:digits/clip"),
        ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
        ("https://huggingface.co/a/b/c", "https://huggingface.co/a/b/c"),
        ("runs/quickstart", "runs/quickstart"),
        ("and/or, 3/4 of them", "and/or, 3/4 of them"),
    ],
)
def test_places_are_shortened(text: str, shown: str) -> None:
    """Not names on the Hub, not addresses of pages, and nothing that is content: a class may be called `/m/01g317`."""
    places = PrivatePlaces()
    document = {"address": text, "labels": ["/m/01g317"], "notices": [{"text": text}]}
    wanted = {"address": shown, "labels": ["/m/01g317"], "notices": [{"text": shown}]}
    assert places.document(document) == wanted
    assert places.text(f"<{text}>") in (f"<{shown}>", f"<{text}>")


@pytest.mark.parametrize(
    "pattern, yes, no",
    [
        ("shards/*.tar", "shards/a-0.tar", "starts/a-0.tar"),
        ("shards/*.tar", "shards/a.tar", "shards/x/a.tar"),
        ("*/*", "0003/a.png", "a.png"),
        ("train-*.parquet", "train-0-of-1.parquet", "x/train-0-of-1.parquet"),
        ("data/**/*.png", "data/a/b/c.png", "c.png"),
        ("**", "a/b", ""),
        ("a+?.tar", "a+1.tar", "aa1.tar"),
    ],
)
def test_patterns_of_cards(pattern: str, yes: str, no: str) -> None:
    assert matches(yes, pattern) and not matches(no, pattern)
