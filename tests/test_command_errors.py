"""Wrong commands that users will type: the message, the exit code, and that nothing else happens.

Messages are compared word for word where they are short: a message is read by someone who is stuck.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import yaml

from engine.data.run.file_names import PLANS
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_DAMAGED, EXIT_INCOMPLETE, EXIT_USER
from engine.job.columns import SCHEMA_VERSION
from tests.conftest import REPOSITORY
from tests.sleepy import run_sleepy

QUICKSTART = str(REPOSITORY / "jobs/quickstart.yaml")
# What must not reach a terminal: escape codes, bells, and characters that turn the direction of the text.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def refused(call, *arguments, code: int = EXIT_USER) -> list[str]:
    """The lines on stderr of a refusal, without what leads each of them, and without those about progress."""
    exit_code, out, err = call(*arguments)
    assert exit_code == code, (exit_code, out, err)
    assert "Traceback" not in err and not STEERING.search(out + err)
    lines = [line for line in err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


# Values -------------------------------------------------------------------------------------------------------------

VALUES = {
    "requests.0.count=-1": "requests.0.count: -1 is below 1; give 1 or more",
    "requests.0.count=0": "requests.0.count: 0 is below 1; give 1 or more",
    "requests.0.count=1e30": "requests.0.count: '1e30' is text to YAML, not a number; write it with its digits, such"
    " as 1000000 or 0.001",
    "requests.0.count=1000000000": "requests.0.count: 1000000000 is above 100000000; give 100000000 or less",
    "requests.0.count=.nan": "requests.0.count: nan is not a whole number",
    "requests.0.count=1.5": "requests.0.count: 1.5 is not a whole number",
    "requests.0.count=many": "requests.0.count: 'many' is not a whole number",
    "requests.0.count=": "requests.0.count: None is nothing; give a whole number, or leave the key out",
    f"seed={2**80}": "seed: 1208925819614629174706176 is not below 9007199254740992; give less than 9007199254740992",
    f"seed={'9' * 400}": f"--set seed: '{'9' * 100}'... is not a YAML value (a number has more than 300 digits)",
    "seed=-1": "seed: -1 is below 0; give 0 or more",
    "sampling.num_inference_steps=0": "sampling.num_inference_steps: 0 is below 1; give 1 or more",
    "sampling.guidance_scale=.nan": "sampling.guidance_scale: nan is not a finite number",
    "sampling.guidance_scale=-.inf": "sampling.guidance_scale: -inf is not a finite number",
    "sampling.guidance_scale=1e400": "sampling.guidance_scale: '1e400' is text to YAML, not a number; write it with its"
    " digits, such as 1000000 or 0.001",
    "sampling.guidance_scale=0.5": "sampling.guidance_scale: 0.5 is below 1; give 1 or more",
    "sampling.scheduler=ddpm": "sampling.scheduler: 'ddpm' draws noise at every step; use a deterministic one: 'lms',"
    " 'ddim', 'euler', 'dpmsolver++' or 'model'",
    "sampling.sheduler=lms": "sampling.sheduler: unknown key; did you mean 'scheduler'?",
    "requests.0.method=bondary": "requests.0.method: 'bondary' is not one of prompt, boundary, risky, entropy, margin,"
    " disagreement, feature; did you mean 'boundary'?",
    "requests.0.boundary=[thre, eight]": "requests.0.boundary.0: 'thre' is not a class of the target; did you mean"
    " 'three'?",
    "requests.0.boundary=[99, eight]": "requests.0.boundary.0: 99 is not a class index of the target; it has 0 to 9",
    "requests.0.boundary=[3, three]": "requests.0.boundary.1: 'three' is class 3, named before; name each once",
    "requests.2.classes=[1.5]": "requests.2.classes.0: 1.5 is not text; put it in quotes if it is meant so",
    "requests.2.classes={}": "requests.2.classes: {} names no classes; give a list of names or indices, such as [three,"
    " 8], or `all`",
    "requests=[]": "requests: [] has fewer entries than 1; give 1 or more",
    "requests=3": "requests: 3 is not a list, such as [a, b]",
    "models=3": "models: 3 is not a mapping of keys to values",
    "models.target=no/such/folder": "models.target: 'no/such/folder' is neither a folder nor a hub id (owner/name) nor"
    " a zoo part (zoo:NAME/PART)",
    "models.target=zoo:digits/clip": "models.target: 'zoo:digits/clip': config.json has no `id2label` with two classes"
    " or more; is it a classifier?",
    "models.oracle=zoo:cifar10/classifier": "models.oracle: 'zoo:cifar10/classifier' has other classes than the target:"
    " it has 'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck', the target has"
    " 'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'; say which are which: {models:"
    " {label_map: {'zoo:cifar10/classifier': {airplane: zero}}}}, if 'airplane' means 'zero', and so on",
    "runtime.device=tpu": "runtime.device: 'tpu' is not one of auto, cpu, cuda; did you mean 'cpu'?",
    "output.image_format=bmp": "output.image_format: 'bmp' is not one of png, jpg, webp",
    "output.uri=hdfs://server/run": "output hdfs://server/run: hdfs:// is not supported; use a folder, s3://BUCKET/NAME"
    " or gs://BUCKET/NAME",
    "output.uri=s3://bucket": "output 's3://bucket': is not of the form SCHEME://BUCKET/NAME; name a folder in a"
    " bucket",
    "output.uri=/dev/null": "output /dev/null: is a file, not a folder; choose another --output",
    "output.uri=~nobody-of-that-name/x": "output ~nobody-of-that-name/x: names the home folder of nobody (Could not"
    " determine home directory.); choose another --output",
    'output.uri="a\\0b"': r"output 'a\x00b': holds a character that no path has; choose another --output",
    "name=../x": "name: '../x' may hold only a-z, 0-9 and inner hyphens",
    "name=a b": "name: 'a b' may hold only a-z, 0-9 and inner hyphens",
    'name="a\\nb"': r"name: 'a\nb' may hold only a-z, 0-9 and inner hyphens",
    'name="\\e[31mred"': r"name: '\x1b[31mred' may hold only a-z, 0-9 and inner hyphens",
    'name="a\\u202Eb"': r"name: 'a\u202eb' may hold only a-z, 0-9 and inner hyphens",
    f"name={'a' * 10_000}": f"name: '{'a' * 56}... has more characters than 64; give 64 or fewer",
    'models.target="\\e]0;title\\a"': r"models.target: '\x1b]0;title\x07' is neither a folder nor a hub id (owner/name)"
    " nor a zoo part (zoo:NAME/PART)",
    'models.clip="x\\u202Ey"': r"models.clip: 'x\u202ey' is neither a folder nor a hub id (owner/name) nor a zoo part"
    " (zoo:NAME/PART)",
    "count": "--set 'count': write it as KEY=VALUE, e.g. requests.0.count=6",
    "=3": "--set '=3': write it as KEY=VALUE, e.g. requests.0.count=6",
    ".=3": "--set .: no such place in the job; paths look like requests.0.count",
    "requests.-1.count=3": "--set requests.-1.count: no such place in the job; paths look like requests.0.count",
    "requests.9.count=3": "--set requests.9.count: no such place in the job; paths look like requests.0.count",
    "name.x=3": "--set name.x: no such place in the job; paths look like requests.0.count",
    "seed=[1": "--set seed: '[1' is not a YAML value (expected ',' or ']', but got '<stream end>')",
    "seed=&a [*a]": "--set seed: '&a [*a]' is not a YAML value (an alias is inside the value that it refers to)",
    "seed=!!python/object/apply:os.system [id]": "--set seed: '!!python/object/apply:os.system [id]' is not a YAML"
    " value (could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system')",
}  # fmt: skip


@pytest.mark.parametrize(("value", "message"), VALUES.items(), ids=[text[:40] for text in VALUES])
def test_a_wrong_value_is_named_with_its_field_and_the_remedy(call, tmp_path, monkeypatch, value, message):
    """One line, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert refused(call, "plan", QUICKSTART, "--validate", "--set", value) == [message]
    assert not list(tmp_path.iterdir())


# Files --------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    b"name: caf\xe9\n": "job.yaml: is not text in UTF-8; give a job file in YAML",
    b"": "job.yaml: is empty; `riskforge schema` prints the schema of a job",
    b"\x00": "job.yaml: contains characters that are not allowed in text; give a job file in YAML",
    b"- a\n": "job: a mapping of keys is expected, not list; see `riskforge schema`",
    b"name: a\nname: b\n": "job.yaml: line 2, column 1: duplicate key 'name'",
    b"name: a\n seed: 0\n": "job.yaml: line 2, column 6: mapping values are not allowed here",
    b"name: *x\n": "job.yaml: line 1, column 7: found undefined alias 'x'",
    b"name: &x {y: *x}\n": "job.yaml: line 1, column 7: found unconstructable recursive node",
    b"seed: !!timestamp x\n": "job.yaml: line 1, column 7: cannot be read as timestamp ('NoneType' object has no"
    " attribute 'groupdict')",
    b"seed: !!bool x\n": "job.yaml: line 1, column 7: cannot be read as bool ('x')",
    b"seed: 0x" + b"f" * 5000: "job.yaml: is not usable YAML (a number has more than 300 digits)",
    LAUGHS.encode(): "job.yaml: is not usable YAML (it has more than 1000000 values with its aliases expanded)",
    b"[" * 5000: "job.yaml: is not usable YAML (nested too deeply)",
}


@pytest.mark.parametrize(("content", "message"), FILES.items(), ids=[str(one[:20]) for one in FILES])
def test_a_file_that_is_not_a_job_is_reported_in_one_line(call, tmp_path, monkeypatch, content, message):
    """With the place, where there is one; also a bomb that would grow to a billion words."""
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_bytes(content)
    assert refused(call, "plan", "job.yaml", "--validate") == [message]


def test_a_long_value_leaves_room_for_the_remedy(call):
    """Names of ten thousand characters are shown by their ends."""
    for value in (f"requests.0.boundary=[{'a' * 10_000}, eight]", f"requests.0.accept.{'b' * 10_000}=1"):
        [line] = refused(call, "plan", QUICKSTART, "--validate", "--set", value)
        assert len(line) < 2100 and re.match(r"requests\.0\.(boundary\.0: 'aaa|accept\.bbb)", line)
        assert line.endswith(("is not a class of the target", "judge_conformity, judge_conformity_margin"))


def test_anchors_of_an_honest_job_are_welcome(call, tmp_path):
    """What is said twice may be said once."""
    raw = yaml.safe_load(Path(QUICKSTART).read_text())
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump(raw | {"requests": []}).replace("requests: []", "")
        + "requests:\n- &one {name: a, method: prompt, classes: all, count: 1}\n- {<<: *one, name: b}\n"
    )
    code, out, _ = call("plan", path, "--validate")
    assert (code, out.splitlines()[0]) == (0, f"{path} is valid")


def test_paths_that_are_no_job(call, tmp_path, monkeypatch):
    """A folder, nothing, a name that steers the terminal, and one that no file system takes."""
    monkeypatch.chdir(tmp_path)
    assert refused(call, "run", ".") == [".: is a folder; give a job file in YAML"]
    assert refused(call, "run", "no.yaml") == ["no.yaml: no such file"]
    assert refused(call, "run", "\x1b[2Jx\u202e") == [r"\x1b[2Jx\u202e: no such file"]
    assert refused(call, "run", "a" * 10_000)[0].endswith(": cannot be read (File name too long)")
    assert refused(call, "run", "/dev/full") == ["/dev/full: is larger than 16 MB; is it a job file?"]


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["runtime.device=cuda"], "runtime.device: 'cuda' but no GPU is visible here; use auto or cpu"),
        (
            ["runtime.device=cpu", "runtime.attention=xformers"],
            "runtime.attention: 'xformers' has no kernels for a CPU; use auto or sdpa",
        ),
        (
            ["runtime.device=cpu", "runtime.precision=fp16"],
            "runtime.precision: 'fp16' saves nothing on a CPU; use auto or fp32",
        ),
    ],
)
def test_hardware_that_is_not_there(call, tmp_path, monkeypatch, changes, message):
    """Told before anything is started."""
    monkeypatch.setattr("engine.driver.checks.GPU_DEVICES", ("no-such-device",))
    sets = [part for change in changes for part in ("--set", change)]
    output = tmp_path / "out"
    assert refused(call, "run", QUICKSTART, "--executor", "local", "--output", output, *sets) == [message]
    assert not output.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "file: is a file, not a folder; choose another --output"),
        ("file/inside", "a part of the path is a file, not a folder; choose another --output"),
        ("x" * 300, "the path is too long; choose a shorter --output"),
        ("\x1b[31mred/\u202erun\n", ""),
    ],
)
def test_outputs_that_cannot_be(call, tmp_path, monkeypatch, output, message):
    """A file, a path through one, one too long; a hostile name is just a name."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    if message:
        lines = refused(call, "plan", QUICKSTART, "--set", f"output.uri={json.dumps(output)}", "--validate")
        assert len(lines) == 1 and lines[0].startswith("output ") and message in lines[0]
    else:
        code, out, err = call("plan", QUICKSTART, "--set", f"output.uri={json.dumps(output)}")
        assert code == 0 and not STEERING.search(out + err) and r"\x1b[31mred/\u202erun" in out
    assert Path("file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_options_that_mean_nothing(call, tmp_path):
    """Times, addresses, choices, and options that need each other."""
    run = ("run", QUICKSTART, "--output", tmp_path / "out")
    assert "--grace" in refused(call, *run, "--grace", "soon")[0]
    assert "--deadline" in refused(call, *run, "--deadline", "25:00")[0]
    assert "--max-duration" in refused(call, *run, "--max-duration", "-3h")[0]
    assert refused(call, *run, "--executor", "local", "--address", "auto") == [
        "--address: applies to --executor ray alone; omit it, or --executor local"
    ]
    assert refused(call, "plan", QUICKSTART, "--validate", "--calibrate") == [
        "--calibrate: makes samples, and --validate only checks; use one of them"
    ]
    code, _, err = call("run", QUICKSTART, "--resume", "\x1b[31mnever")
    assert code == EXIT_USER and "Traceback" not in err and "\x1b[31mnever" not in err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of five shards."""
    output = tmp_path_factory.mktemp("errors") / "run"
    run_sleepy(output, 2, LocalExecutor(1))
    return output


@pytest.mark.parametrize("command", ["status", "verify", "repair", "retry", "report"])
def test_folders_without_a_run(call, tmp_path, command):
    """Empty, missing, and a file."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        [line] = refused(call, command, path)
        assert str(path) in line and re.search("there is no run|is a file, not a folder|no manifest|such file", line)
        assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 99}, f"(schema_version 99 is not one of 1 to {SCHEMA_VERSION})"),
        ({"schema_version": 0}, f"(schema_version 0 is not one of 1 to {SCHEMA_VERSION})"),
        ({"plan_version": 99}, "(version 99)"),
        ({"stage": [{"nothing": 1}]}, "cannot be read as the plan of a run"),
        ({"stage": 3}, "cannot be read as the plan of a run"),
        ({"identity": []}, "cannot be read as the plan of a run"),
        ({"job": {"name": "x", "output": {}}}, "models: missing"),
    ],
)
def test_runs_of_other_versions(call, whole, tmp_path, changes, reason):
    """From the future, or damaged: every command reports it in one line and changes nothing."""
    import shutil

    output = shutil.copytree(whole, tmp_path / "run")
    [path] = (output / PLANS).iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for command in ("status", "verify"):
        lines = refused(call, command, output)
        assert any(reason in line for line in lines)
    assert len(list((output / "shards").glob("*.tar"))) == 5


def test_a_foreign_tar_in_a_run(call, whole, tmp_path):
    """A shard that is another's is damage; a stranger's file keeps a run from being overwritten."""
    import shutil

    output = shutil.copytree(whole, tmp_path / "run")
    with tarfile.open(output / "shards/sleepy-000001.tar", "w") as tar:
        data = b"mine"
        info = tarfile.TarInfo("../../escaped.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    code, out, err = call("verify", output)
    assert code == EXIT_DAMAGED and "Traceback" not in err
    assert "damage: " in out and "member '../../escaped.txt' is where an image should be" in out
    assert not (tmp_path.parent / "escaped.txt").exists()
    (output / "shards/thesis.tar").write_bytes(b"mine")
    lines = refused(
        call, "run", QUICKSTART, "--output", output, "--executor", "local", "--resume", "overwrite", "--yes"
    )
    assert "thesis.tar" in lines[-1] and (output / "shards/thesis.tar").read_bytes() == b"mine"


def test_damaged_images_are_listed(call, tmp_path):
    """Cut short, no image at all, of a class that is not there, and a picture as large as a town."""
    data = tmp_path / "data"
    for folder in ("three", "cat\x1b[31m", "5"):
        (data / folder).mkdir(parents=True)
    good = io.BytesIO()
    PIL.Image.new("RGB", (32, 32)).save(good, "png")
    (data / "three/cut.png").write_bytes(good.getvalue()[:60])
    (data / "three/words.png").write_bytes(b"just words")
    (data / "three/empty.png").write_bytes(b"")
    (data / "cat\x1b[31m/a.png").write_bytes(good.getvalue())
    PIL.Image.new("1", (10_000, 10_000)).save(data / "5/large.png")
    job = ("prepare", QUICKSTART, "--data", data, "--output", tmp_path / "out", "--executor", "local")
    [line] = refused(call, *job)
    assert line.startswith("--data: ") and "has no usable image (read as a folder by class)" in line
    assert r"'cat\x1b[31m' is not a class of the target" in line and "and 2 more" in line
    assert not (tmp_path / "out").exists()


def test_a_worker_that_outlives_its_run_leaves_no_traceback(monkeypatch):
    """A process that ends takes no more commits: the thread of a stopped worker finds that out after its shard."""
    unhandled = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    worker = SimpleNamespace(sample_shard=lambda *_: lambda: None)
    executor = LocalExecutor(1)
    executor.open(lambda: worker, 1)
    # Runs of other tests may have left theirs, of the same name.
    before = set(threading.enumerate())
    executor.start_worker(0)
    (thread,) = [one for one in threading.enumerate() if one.name == "worker-0" and one not in before]

    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    executor.submit(0, SimpleNamespace(number=0), 0)
    thread.join(10)
    assert not thread.is_alive() and not unhandled


LIMITED = """
import resource, sys
from engine.errors import EXIT_USER
from tests import sleepy
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
sys.exit(sleepy.main(sleepy.Path(sys.argv[1]), 2, "local", sleepy.Faults()))
"""


def test_a_file_that_may_not_grow(tmp_path):
    """A limit of the process, met in the middle of a shard, as a full disk is (`tests/test_chaos.py` has that): a line
    with the remedy, nothing half-written published."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (EXIT_USER, EXIT_INCOMPLETE) and "Traceback" not in done.stderr
    assert "the file is larger than this file system or the limit of the process allows" in done.stderr
    assert not list((tmp_path / "out").glob("shards/*"))
