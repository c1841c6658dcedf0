"""Networks from files of TorchScript and torch.export, and from factories: opened, tried on black images, frozen.

What is trusted: a factory is the user's own code and runs as such. TorchScript and torch.export files are programs
too. Neither is unpickled by Python: TorchScript has a reader of its own in C++; of an export, tensors are plain bytes
here, and its example inputs go through torch's restricted reader (`weights_only`), which is forced because torch 2.10
falls back to the unrestricted one. Symbolic shapes of an export are still evaluated by sympy, and operators of
TorchScript may write files: open models of people you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import JobError
from engine.models.factories import find_factory, reason_of
from engine.models.program_settings import EXAMPLE, TargetSettings, parse_settings, side_settings
from engine.models.program_trial import Network, check_outputs, type_name
from engine.models.programs import archive_kind, as_file

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def open_program(address: str, device: str) -> tuple[Network, TargetSettings]:
    """The network of a file or factory on a device, with frozen parameters, and its settings.

    The network takes [B, 3, h, w] and gives logits [B, n]; it was tried on black images.

    Raises:
        JobError: it cannot be opened, or does not do that.
    """
    path = as_file(address)
    if path is None:
        module, settings = call_factory(address)
        return _ready(module.float().to(device).eval(), settings, address, device), settings
    kind, settings = archive_kind(path, address), side_settings(path, address)
    return _ready(_open_file(path, kind, address, device), settings, address, device), settings


def _ready(module: Any, settings: TargetSettings, address: str, device: str) -> Network:
    """A module with frozen parameters that was tried."""
    # One by one: modules of TorchScript know no more than that.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    check_outputs(module, settings, address, device)
    return module


def _open_file(path: Path, kind: str, address: str, device: str) -> Any:
    what = "a TorchScript module" if kind == "torchscript" else "an exported program"
    try:
        if kind == "torchscript":
            return torch.jit.load(path, map_location=device).eval()
        from torch.export.passes import move_to_device_pass

        # torch warns that it reads tensors without a copy.
        with _weights_only(), warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            program = torch.export.load(file)
        # It has no modes: whether it was in evaluation mode was settled when it was exported.
        return (program if device == "cpu" else move_to_device_pass(program, device)).module()
    except Exception as error:
        # A damaged or hostile archive raises whatever its readers stumble over.
        raise JobError(f"'{address}' cannot be loaded as {what} ({reason_of(error)})") from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let `torch.load` read nothing but tensors and plain data, whatever its caller asks for."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def call_factory(address: str) -> tuple[torch.nn.Module, TargetSettings]:
    """Module and settings of `package.module:factory`.

    Raises:
        JobError: no such module or factory, it fails, or it gives something else.
    """
    factory = find_factory(address)
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise JobError(f"'{address}' failed: {reason_of(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        raise JobError(
            f"'{address}' gave {type_name(made)}; return a pair of a torch.nn.Module and its settings, such as"
            f" {EXAMPLE}"
        )
    module, settings = made
    return module, parse_settings(settings, f"'{address}'")


def describe_factory(address: str) -> tuple[tuple[str, ...], str]:
    """Labels and digest of what a factory gives, which is tried on black images.

    The digest is of address, settings, and names, types, shapes and bytes of all parameters and buffers. Code is not
    part of it: a change of `forward` alone is not noticed.

    Raises:
        JobError: as `call_factory`; or it gives other weights at every call: no two workers would have one model.
    """
    module, settings = call_factory(address)
    digest = _module_digest(address, module, settings)
    _ready(module.float().eval(), settings, address, "cpu")
    if digest != _module_digest(address, *call_factory(address)):
        raise JobError(
            f"'{address}' gives other weights or settings every time it is called; load trained weights in it"
        )
    return settings.labels, digest


def _module_digest(address: str, module: torch.nn.Module, settings: TargetSettings) -> str:
    digest = hashlib.sha256(f"{address}\0{settings.model_dump_json()}\0".encode())
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name, tensor in sorted(state.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
