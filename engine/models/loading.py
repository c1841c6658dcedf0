"""Loading models of diffusers and transformers: errors that name the model, complete weights, frozen parameters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import JobError, first_line
from engine.methods.heartbeat import beat
from engine.models.weight_files import weights_variant

_LOADING = threading.RLock()
# Raised by the libraries on damaged files, and on values that they do not expect.
_MISREAD = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
)  # fmt: skip


@contextlib.contextmanager
def loading(address: str, kind: str) -> Iterator[None]:
    """Turn errors of the libraries on missing, damaged or unsuitable files into a message that names the model.

    One model at a time: while diffusers loads, modules that other threads create are on the meta device.

    Raises:
        JobError: in place of those errors.
    """
    import safetensors
    from huggingface_hub.errors import StrictDataclassError

    try:
        with _LOADING:
            yield
        beat()
    except JobError:
        raise
    except StrictDataclassError as error:
        # A value of a wrong type in a configuration: the first line has the field, the second the value.
        raise JobError(f"'{address}' cannot be loaded as {kind} ({' '.join(str(error).split())})") from error
    except (*_MISREAD, safetensors.SafetensorError) as error:
        raise JobError(f"'{address}' cannot be loaded as {kind} ({first_line(error)})") from error


def load_weights(kind: Any, folder: Path, **more: Any) -> Any:
    """A model of transformers in float32 with all of its weights, from safetensors alone; no code of the folder runs.

    Args:
        kind: the class of the model, or an `Auto` class.
        more: further arguments of `from_pretrained`.

    Raises:
        ValueError: as `whole`.
    """
    import torch

    return whole(
        kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            variant=weights_variant(folder),
            output_loading_info=True,
            **more,
        )
    )


def whole(loaded: tuple[Any, dict[str, Any]]) -> Any:
    """The model of `from_pretrained(..., output_loading_info=True)`, if the files have all of its weights.

    diffusers and transformers would fill gaps with random numbers.

    Raises:
        ValueError: weights are missing; within `loading` the error names the model.
    """
    model, info = loaded
    if missing := sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())])):
        raise ValueError(
            f"its files lack {len(missing)} of the weights of a {type(model).__name__}, such as {missing[0]}, which"
            " would be drawn at random; save the whole model"
        )
    return model


def frozen(module: Any, device: str) -> Any:
    """A module on its device, in evaluation mode, its parameters without gradients."""
    module.requires_grad_(False)
    return module.to(device).eval()
