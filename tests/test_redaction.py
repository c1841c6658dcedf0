"""Passwords in addresses: in no message, no stored file, whatever the field, the option and the characters."""

from __future__ import annotations

import copy
import itertools
import json
import typing
from typing import Any

import click
import pytest
import typer
import yaml
from pydantic import BaseModel

from engine import cli
from engine.commands.jobfile import parse_override, read_job
from engine.data.images import open_images
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError, RiskforgeError
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.models.job_checks import check_addresses
from engine.terminal import json_text
from tests.test_terminal import SCHEMES, SECRET

JOB = {
    "name": "a",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier",
    },
    "requests": [{"name": "r", "method": "prompt", "classes": "all", "count": 1}],
    "output": {"uri": "out"},
}  # fmt: skip


def places(spec: type[BaseModel], where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all fields of the schema that take text."""
    paths: list[tuple[Any, ...]] = []
    for name, field in spec.model_fields.items():
        waiting, kinds = [field.annotation], []
        while waiting:
            kind = waiting.pop()
            kinds.append(kind)
            waiting += typing.get_args(kind)
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        is_list = any(typing.get_origin(kind) is tuple for kind in kinds)
        path = (*where, name, *((0,) if is_list else ()))
        for model in nested:
            paths += places(model, path)
        if str in kinds or Any in kinds:
            paths.append(path)
    return paths


PLACES = sorted({".".join(map(str, path)) for path in places(JobSpec)})


def with_value(where: str, value: str) -> dict[str, Any]:
    raw: Any = copy.deepcopy(JOB)
    current: Any = raw
    *parents, last = where.split(".")
    for part, after in itertools.pairwise([*parents, last]):
        if isinstance(current, dict) and isinstance(current.get(part), str):
            del current[part]
        if isinstance(current, list):
            current += [{}] if int(part) >= len(current) else []
            current = current[int(part)]
        else:
            current = current.setdefault(part, [] if after.isdigit() else {})
    if isinstance(current, list):
        current[:] = [value]
    else:
        current[last] = value
    return raw


@pytest.mark.parametrize("where", PLACES)
def test_no_field_of_a_job_shows_a_password(where, tmp_path):
    """Refused by name, field and remedy, before anything is stored; `parse_job` alone does not show it either."""
    value = f"https://user:{SECRET}@host/model"
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(with_value(where, value)))
    with pytest.raises(JobError) as caught:
        read_job(path, [])
    assert SECRET not in str(caught.value) and where.removesuffix(".0") in str(caught.value)
    assert "https://***@host/model" in str(caught.value) and "environment" in str(caught.value)
    for text in (value, f"https://{'u' * 80}:{SECRET}@host", f"https://user:{'p' * 3000}{SECRET}@host"):
        with pytest.raises(RiskforgeError) as later:
            check_addresses(parse_job(with_value(where, text)))
            raise JobError("not refused")
        assert SECRET not in str(later.value) and "ppp" not in str(later.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_reader_of_addresses_shows_a_password(scheme):
    """Stores, images, overrides: what they raise is an error of this project, whose text has none."""
    address = f"{scheme}user:{SECRET}@bucket/name"
    for read in (
        lambda: open_store(address).read("x"),
        lambda: open_images(address, ("a", "b"), "--data"),
        lambda: parse_override(address),
        lambda: parse_override(f"a=[{address}"),
    ):
        with pytest.raises(RiskforgeError) as caught:
            read()
        assert SECRET not in str(caught.value)


def options() -> list[tuple[str, str]]:
    """Commands with their options that take a text, and their arguments."""
    pairs = []
    root = typer.main.get_command(cli.app)
    assert isinstance(root, click.Group) or hasattr(root, "commands")
    for name, command in sorted(root.commands.items()):
        params = [param for param in command.params if not getattr(param, "is_flag", False) and param.name != "help"]
        pairs += [(name, param.opts[0] if param.param_type_name == "option" else "") for param in params]
    return pairs


@pytest.mark.parametrize(("command", "option"), options(), ids=str)
def test_no_option_shows_a_password(command, option, call):
    """Every option and argument of every command, with a space or an equals sign."""
    address = f"s3://user:{SECRET}@bucket/name"
    for given_ in ([option, address], [f"{option}={address}"]) if option else ([address],):
        code, out, error = call(command, *given_)
        assert code == 2 and SECRET not in out + error
        assert (option or "command line") in error and "environment" in error


def test_an_address_of_ray_shows_no_password(call, tmp_path):
    """It has no scheme."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    code, out, error = call("run", path, "--address", f"user:{SECRET}@127.0.0.1:1")
    assert code == 2 and SECRET not in out + error and "--address" in error


def test_what_is_printed_or_kept_has_none(capsys):
    """The last door: whatever a library said."""
    from engine.driver.executors.base import WorkerHost
    from engine.terminal import show

    show(f"a https://u:{SECRET}@h b")
    assert capsys.readouterr().out == "a https://***@h b\n"
    assert json.loads(json_text({"a": f"https://u:{SECRET}@h", "b": "x@y"})) == {"a": "https://***@h", "b": "x@y"}

    def factory():
        raise ValueError(f"no https://u:{SECRET}@h")

    assert SECRET not in WorkerHost(0).load(factory).message
    assert SECRET not in str(OutputError(f"no s3://u:{SECRET}@h"))
