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
import importlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import MAX_REASON_CHARS, JobError
from engine.job.spec_messages import nearest
from engine.methods.custom.criterion import same_values
from engine.models.randomness import watched
from engine.models.targets import (
    EXAMPLE,
    TargetSettings,
    archive_kind,
    as_file,
    import_folders,
    module_of,
    parse_settings,
    side_settings,
)
from engine.terminal import redacted

# One row alone, and a number that nobody exports for.
PROBE_ROWS = (1, 3)
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

Network = Callable[[Tensor], Tensor]


def open_foreign(address: str, device: str) -> tuple[Network, TargetSettings]:
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
    _try(module, settings, address, device)
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
            f"'{address}' gave {_type_of(made)}; return a pair of a torch.nn.Module and its settings, such as {EXAMPLE}"
        )
    module, settings = made
    return module, parse_settings(settings, f"'{address}'")


def find_factory(address: str) -> Callable[[], Any]:
    """The function of `package.module:factory`.

    Raises:
        JobError: no such module, it cannot be imported, or it has no such function.

    Side effects: imports the module.
    """
    name, attribute = module_of(address)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise JobError(f"'{address}': module '{name}' cannot be imported: {reason_of(error)}") from error
        looked = ", ".join(repr(folder) for folder in import_folders()) or "the folders of installed packages"
        raise JobError(
            f"'{address}': there is no module '{error.name}'; it was looked for in {looked} and PYTHONPATH: start in"
            " the folder that holds it, lay it beside the job file, or set PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise JobError(f"'{address}': module '{name}' cannot be imported: {reason_of(error)}") from error
    factory = getattr(module, attribute, None)
    if callable(factory):
        return factory
    what = "has no" if factory is None else "has something that cannot be called as"
    place = getattr(module, "__file__", None) or "a folder without __init__.py"
    known = [one for one in vars(module) if not one.startswith("_")]
    raise JobError(f"'{address}': module '{name}' ({place}) {what} '{attribute}'{nearest(attribute, known)}")


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


@torch.no_grad()
def _try(network: Network, settings: TargetSettings, address: str, device: str) -> None:
    """Show images to a network: black ones, then random ones: are they logits, and decided by the image?

    Raises:
        JobError: it fails, its output is not [B, n] finite logits, or an image's logits are not decided by the image.
    """
    num_classes, (height, width) = len(settings.labels), settings.shape
    for rows in PROBE_ROWS:
        images = torch.zeros(rows, 3, height, width, device=device)
        try:
            output = network(images)
        except (Exception, SystemExit) as error:
            raise JobError(
                f"'{address}' fails on a batch of {rows} images, {list(images.shape)}: {reason_of(error)}; image_size"
                " must be what it takes, and the size of a batch free (torch.export: dynamic_shapes with a Dim for it)"
            ) from error
        if not isinstance(output, Tensor) or output.shape != (rows, num_classes):
            what = list(output.shape) if isinstance(output, Tensor) else _type_of(output)
            raise JobError(
                f"'{address}' gives {what} for {rows} images where [{rows}, {num_classes}] is expected;"
                f" {_shape_remedy(output, rows, num_classes)}"
            )
        if not output.isfinite().all():
            raise JobError(f"'{address}' gives values that are not finite for black images; replace its weights")
    try:
        problem = _chance_problem(network, _probes(height, width, device))
    except Exception as error:
        raise JobError(f"'{address}' fails on random images: {reason_of(error)}; it must take any image") from error
    if problem:
        raise JobError(f"'{address}' {problem}")


def _shape_remedy(output: Any, rows: int, num_classes: int) -> str:
    """What to return where the shape of an output is another."""
    if isinstance(output, Tensor) and output.shape in ((rows,), (rows, 1)) and num_classes == 2:
        return "a single logit z of two classes is the pair of logits [0, z]: return torch.stack([0 * z, z], 1)"
    return f"return logits alone, a column for each of the {num_classes} names in labels"


def _probes(height: int, width: int, device: str) -> Tensor:
    """Random images [8, 3, h, w], always the same; half of them beyond all contrast, where logits grow."""
    noise = torch.randn(8, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * torch.tensor([1.0, 100.0]).repeat(4).reshape(8, 1, 1, 1)).to(device)


def _chance_problem(network: Network, images: Tensor) -> str | None:
    """Why the outputs of a network are no logits that the images decide, or None."""
    output, drawn = watched(lambda: network(images))
    if drawn or not same_values(output, network(images)):
        what = f"draws random numbers ({', '.join(drawn)})" if drawn else "gives other values for equal images"
        return (
            f"{what}; logits must be decided by the image alone: switch dropout off (export in evaluation mode), draw"
            " nothing, and keep nothing between calls"
        )
    values = output[output.isfinite().all(1)]
    if len(values) and (values >= 0).all() and (values <= 1).all():
        sums_to_one = torch.allclose(values.float().sum(1), torch.ones(len(values), device=values.device), atol=1e-3)
        kind, layer = ("", "softmax") if sums_to_one else (" of independent classes", "sigmoid")
        return f"gives probabilities{kind}; return logits, as they are before the {layer}"
    # Those beyond all contrast round too much to be compared.
    alone, together = torch.cat([network(image[None]) for image in images[::2]]), output[::2]
    largest = float(together.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(alone, together, rtol=1e-2, atol=1e-2 * largest, equal_nan=True):
        return (
            "gives an image other logits in another batch; each must be computed by itself: export in evaluation mode"
            " (a batch normalisation in training mode takes its statistics from the batch)"
        )
    return None


def _type_of(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing"


def reason_of(error: BaseException) -> str:
    """An error in a line, with the place in the user's code that it came from."""
    text = redacted((str(error).strip().splitlines() or [""])[0])[:MAX_REASON_CHARS]
    frames = [one for one in traceback.extract_tb(error.__traceback__) if _is_users(one.filename)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def _is_users(filename: str) -> bool:
    others = (Path(torch.__file__).parent, Path(os.__file__).parent, Path(__file__).parent)
    return not filename.startswith(("<", *map(str, others)))
