"""Networks from files of TorchScript and torch.export, and from factories: opened, tried and frozen.

What is trusted: a factory is the user's own code and runs as such. TorchScript and torch.export files are programs
too. Neither is unpickled by Python: TorchScript has its own reader in C++; in an export, tensors are plain bytes,
and its example inputs go through torch's restricted reader (`weights_only`), which is forced because torch 2.10
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
from engine.models.factories import call_with_files, find_factory, reason_of, working_folders
from engine.models.factory_cache import Description, check_unchanged
from engine.models.factory_folders import StoredFactory, read_factory_folder
from engine.models.kernels import full_float32
from engine.models.program_settings import EXAMPLE, TargetSettings, parse_settings, side_settings
from engine.models.program_trial import Network, check_outputs, type_name
from engine.models.programs import archive_kind, as_file
from engine.models.training_trial import training_problem
from engine.models.two_logits import Paired

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def open_program(address: str, device: str) -> tuple[Network, TargetSettings]:
    """The network of a file or factory on a device, with frozen parameters, and its settings.

    The network takes images [B, 3, h, w] after preprocessing and gives logits [B, n]; it has been tried
    (`engine.models.program_trial.check_outputs`).

    Raises:
        JobError: it cannot be opened, or does not give logits.
    """
    path = as_file(address)
    if path is None:
        module, settings = call_factory(address)
        check_unchanged(address, module_digest(address, module, settings))
        return _ready(module.float().to(device).eval(), settings, address, device), settings
    kind, settings = archive_kind(path, address), side_settings(path, address)
    return _ready(_open_file(path, kind, address, device), settings, address, device), settings


def _ready(module: Any, settings: TargetSettings, address: str, device: str) -> Network:
    """A module, after its parameters are frozen and its outputs are checked; one logit becomes two."""
    # One by one: modules of TorchScript have no `requires_grad_`.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module = Paired(module) if settings.is_binary else module
    # As it is scored with: kernels of lower precision give an image other logits in another batch.
    with full_float32(device):
        check_outputs(module, settings, address, device)
    return module


def _open_file(path: Path, kind: str, address: str, device: str) -> Any:
    what = "a TorchScript module" if kind == "torchscript" else "an exported program"
    try:
        if kind == "torchscript":
            return torch.jit.load(path, map_location=device).eval()
        from torch.export.passes import move_to_device_pass

        # torch warns that it does not copy tensors.
        with _weights_only(), warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            program = torch.export.load(file)
        # Not put into evaluation mode: the mode of an exported program is that of its export.
        return (program if device == "cpu" else move_to_device_pass(program, device)).module()
    except Exception as error:
        # Readers raise errors of many kinds on a damaged or hostile archive.
        raise JobError(f"'{address}' cannot be loaded as {what} ({reason_of(error)})") from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let `torch.load` read only tensors and plain data, whatever arguments its caller passes."""
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
    """Module and settings of `package.module:factory`, or of the folder of a retrained one.

    Raises:
        JobError: no such module or factory, it fails, it returns something else, or it does not take the weights.
    """
    stored = read_factory_folder(address)
    if stored is None:
        return _called(address)
    module, settings = _called(stored.factory)
    if settings.labels != stored.labels:
        raise JobError(
            f"'{address}': '{stored.factory}' has other classes than when its weights were stored; restore it, or"
            " retrain again"
        )
    _load_weights(module, stored)
    return module, settings.model_copy(update={"temperature": stored.temperature})


def _called(address: str) -> tuple[torch.nn.Module, TargetSettings]:
    """What a factory returns, checked."""
    factory = find_factory(address)
    try:
        pair = call_with_files(address, factory)
    except (Exception, SystemExit) as error:
        raise JobError(f"'{address}' failed: {reason_of(error)}{_looked_up(address, error)}") from error
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], torch.nn.Module):
        raise JobError(
            f"'{address}' gave {type_name(pair)}; return a pair of a torch.nn.Module and its settings, such as"
            f" {EXAMPLE}"
        )
    module, settings = pair
    return module, parse_settings(settings, f"'{address}'", *working_folders(address))


def _looked_up(address: str, error: BaseException) -> str:
    """Where a missing file was looked for."""
    if not isinstance(error, FileNotFoundError):
        return ""
    folders = ", ".join(f"'{folder}'" for folder in working_folders(address))
    return f"; files that it opens are looked up in {folders}"


def _load_weights(module: torch.nn.Module, stored: StoredFactory) -> None:
    """Give a factory's network the stored weights, all of them.

    Raises:
        JobError: the file is missing or damaged, or the network has other parameters.
    """
    import safetensors
    from safetensors.torch import load_model

    try:
        load_model(module, stored.weights)
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise JobError(
            f"'{stored.weights}' does not hold the weights of '{stored.factory}' ({' '.join(str(error).split())[:300]})"
            "; restore the factory as it was, or retrain again"
        ) from None


def describe_factory(address: str) -> Description:
    """Settings, digest and trainability of a factory's network, which is tried.

    The digest is of the factory's name, the settings, and names, types, shapes and bytes of all parameters and buffers.
    It does not include code: a change of `forward` alone is not noticed.

    Raises:
        JobError: as `call_factory`; or weights differ from call to call: workers would have different models.
    """
    module, settings = call_factory(address)
    digest = module_digest(address, module, settings)
    _ready(module.float().eval(), settings, address, "cpu")
    module, again = call_factory(address)
    if digest != module_digest(address, module, again):
        raise JobError(
            f"'{address}' gives other weights or settings every time it is called; load trained weights in it"
        )
    trained = Paired(module.float()) if settings.is_binary else module.float()
    return Description(settings=settings, digest=digest, untrainable=training_problem(trained, settings))


def module_digest(address: str, module: torch.nn.Module, settings: TargetSettings) -> str:
    """Digest of a factory's network, wherever the folder of a retrained one is."""
    stored = read_factory_folder(address)
    name = stored.factory if stored else address
    digest = hashlib.sha256(f"{name}\0{settings.model_dump_json()}\0".encode())
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    for name, tensor in sorted(state.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
