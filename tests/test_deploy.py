"""What is in `deploy/`: files with which a run is started on machines that this project has not.

Schemas of others, linters, and the parts that run on one machine. Whole launches: `test_slurm.py` and `test_submit.py`;
`docs/clusters.md` says what was never run.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine.job.parsing import parse_job
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def linter(name: str) -> str:
    """The program, next to this Python or on the PATH."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def load_documents(name: str) -> list[dict[str, Any]]:
    """The documents of a YAML file of the folder."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


# Ray's cluster launcher ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """`cluster.yaml`."""
    return load_documents("cluster.yaml")[0]


def test_the_example_cluster_is_one_that_ray_accepts(cluster: dict[str, Any]) -> None:
    """Against the schema that `ray up` checks with; and workers there are spot machines with a GPU."""
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    worker = cluster["available_node_types"]["gpu-spot"]
    assert worker["resources"]["GPU"] == 1
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def installed_by(commands: list[str]) -> list[str]:
    """What the command of uv among these installs into the machines' environment, as requirements."""
    [command] = [command for command in commands if "uv pip install" in command]
    folder, _, install = command.partition(" && ")
    # Only in the folder of pyproject.toml does uv keep to its `constraint-dependencies`.
    assert folder == "cd /home/ubuntu/riskforge"
    words = shlex.split(re.sub(r"-q |--python \S+ ", "", install))[3:]
    return [re.sub(r"^\.(?=\[|$)", "riskforge", word) for word in words]


def required(requirements: list[str]) -> set[str]:
    """Distributions that are installed for these requirements, and for theirs, as their metadata has it."""
    found: set[str] = set()
    open_ = [(Requirement(one), "") for one in requirements]
    done = set()
    while open_:
        requirement, extra = open_.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for own in ("", *requirement.extras):
            if (name, own) not in done:
                done.add((name, own))
                open_ += [(Requirement(line), own) for line in requires(name)]
    return found


def requires(name: str) -> list[str]:
    """What a distribution requires; of this project as pyproject.toml has it now."""
    if name == "riskforge":
        extras = PROJECT["optional-dependencies"].items()
        return PROJECT["dependencies"] + [f"{line}; extra == '{extra}'" for extra, lines in extras for line in lines]
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def environment_of(names: set[str], folder: Path) -> Path:
    """A folder of packages that has these distributions alone, by links to those installed here."""
    folder.mkdir()
    for name in names - {"riskforge"}:
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for top in {Path(str(file)).parts[0] for file in files} - {"..", "__pycache__"}:
            target = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def import_provider(packages: Path) -> subprocess.CompletedProcess[str]:
    """Import Ray's AWS provider where only these packages are."""
    program = f"import sys; sys.path.append({str(packages)!r}); " + "; ".join(
        f"import ray.autoscaler._private.aws.{name}" for name in ("node_provider", "config")
    )
    return subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=120)


def test_the_environment_of_the_cluster_has_rays_aws_provider(cluster: dict[str, Any], tmp_path: Path) -> None:
    """Its imports are tried with what `setup_commands` install, and nothing else; without the extra they fail."""
    requirements = installed_by(cluster["setup_commands"])
    assert requirements == ["riskforge[cluster]"]
    whole = import_provider(environment_of(required(requirements), tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    bare = import_provider(environment_of(required(["riskforge"]), tmp_path / "bare"))
    assert "No module named 'boto" in bare.stderr


# KubeRay -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    """The RayJob among the documents of `rayjob.yaml`."""
    [found] = [document for document in load_documents("rayjob.yaml") if document["kind"] == "RayJob"]
    return found


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    """Of KubeRay's schema."""
    schema = json.loads((DEPLOY / "crds/rayjobs.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_rayjob_is_one_that_kuberay_accepts(
    rayjob: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    """Every field exists, with a value of its type."""
    assert [error.message for error in validator.iter_errors(rayjob)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shutdownAfterJobFinished",), True),
        (("rayClusterSpec", "authOptions", "mode"), "password"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "nodeSelectors"), {}),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"), []),
        (("rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"), "16"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_the_schema_refuses_what_kubernetes_would_drop(
    rayjob: dict[str, Any], validator: jsonschema.Draft202012Validator, path: tuple[Any, ...], value: Any
) -> None:
    """Fields that do not exist, anywhere, and values of other types."""
    changed = copy.deepcopy(rayjob)
    place = changed["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not validator.is_valid(changed)


def test_the_parts_of_the_rayjob_fit_together(rayjob: dict[str, Any]) -> None:
    """Volumes and the job are there, all pods have one image, Ray's version is the tested one, and the job is valid."""
    documents = load_documents("rayjob.yaml")
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    spec = rayjob["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"]["template"]["spec"]] + [
        group["template"]["spec"] for group in spec["workerGroupSpecs"]
    ]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            maps, claims = volume.get("configMap"), volume.get("persistentVolumeClaim")
            assert names & {
                ("ConfigMap", maps and maps["name"]),
                ("PersistentVolumeClaim", claims and claims["claimName"]),
            }
    assert f"ray=={spec['rayVersion']}" in constraints()
    [job] = [document["data"]["job.yaml"] for document in documents if document["kind"] == "ConfigMap"]
    assert parse_job(yaml.safe_load(job)).runtime.device == "cuda"


def constraints() -> list[str]:
    """Versions that were tested together."""
    raw = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    return list(raw["tool"]["uv"]["constraint-dependencies"])


def test_commands_of_the_rayjob_are_in_the_image(rayjob: dict[str, Any]) -> None:
    """`until-done` is copied there, and `riskforge` reads the options."""
    from tests.test_docs import check_command

    first, *command = shlex.split(rayjob["spec"]["entrypoint"])
    assert f"/usr/local/bin/{first}\n" in (DEPLOY / "Dockerfile").read_text() and command[0] == "riskforge"
    check_command(command[1:])


# Scripts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    """All of its default rules."""
    result = subprocess.run([linter("shellcheck"), str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert os.access(path, os.X_OK)


def test_the_dockerfile_passes_hadolint() -> None:
    """All of its default rules."""
    command = [linter("hadolint"), "--no-color", str(DEPLOY / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def until_done(program: str, **environment: str) -> subprocess.Popen[str]:
    """Start the script with a program of Python."""
    return subprocess.Popen(
        [str(DEPLOY / "until-done.sh"), sys.executable, "-S", "-c", program],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_a_command_is_started_again_while_it_ends_with_75(tmp_path: Path) -> None:
    """And its last exit code is passed on."""
    path = tmp_path / "starts"
    program = f"file = open({str(path)!r}, 'a'); file.write('.'); raise SystemExit(75 if file.tell() < 3 else 3)"
    process = until_done(program, RISKFORGE_PAUSE_SECONDS="0.1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and path.read_text() == "..." and errors.count("continues in 0.1 s") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_once_and_it_is_not_started_again(number: signal.Signals) -> None:
    """Also one to the whole process group, as Ray's job server sends it. A second one would end a run at once."""
    program = """if True:
        import signal, time
        received = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: received.append(number))
        print("ready", flush=True)
        while not received:
            time.sleep(0.02)
        time.sleep(0.3)
        print(received, flush=True)
        raise SystemExit(75)"""
    process = until_done(program)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (75, f"[{int(number)}]\n")


# The wheel -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the image builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    result = subprocess.run(
        ["uv", "build", "--quiet", "--wheel", "--out-dir", str(folder)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of programs of a new environment with the wheel; its libraries are those of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", str(tmp_path / "env/bin/python"), str(wheel)]
    subprocess.run(command, check=True)
    [packages] = (tmp_path / "env/lib").glob("python*/site-packages")
    # A folder that is added like this has its own `.pth` files ignored, so that the repository is not on the path.
    (packages / "libraries.pth").write_text(str(Path(jsonschema.__file__).parents[1]) + "\n")
    yield tmp_path / "env/bin"


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    """With the zoo's models in it: a job is planned and validated."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*arguments: str) -> str:
        result = subprocess.run(
            [str(installed / "riskforge"), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    shutil.copy(REPOSITORY / "jobs/quickstart.yaml", tmp_path)
    assert PROJECT["version"] in call("--version")
    assert "quickstart.yaml is valid" in call("plan", "quickstart.yaml", "--validate")
    program = "import engine; print(engine.__file__)"
    where = subprocess.run(
        [str(installed / "python"), "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(tmp_path))


@pytest.mark.slow
def test_the_wheel_has_the_zoo_and_no_more_than_the_package(wheel: Path) -> None:
    """Everything that git tracks below `engine`, nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "engine"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert names == set(tracked.stdout.split())
