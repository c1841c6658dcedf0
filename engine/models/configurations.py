"""The JSON configurations in a model's folder, and the parts that a pipeline's index names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole

PIPELINE_INDEX = "model_index.json"
# In the folder of a conditioning artefact, which is not a model and yet a part of a zoo.
ARTEFACT_DOCUMENT = "conditioning.json"
# In the folder of an artefact that holds a calibration alone.
CALIBRATION_DOCUMENT = "calibration.json"
# In the folder of an artefact that estimates how many people agree with a label.
VALIDITY_DOCUMENT = "validity.json"
# In the folder of an artefact that is an oracle: labelled images by their features.
NEIGHBOURS_DOCUMENT = "neighbours.json"
# In the config.json of a folder that timm saved.
TIMM_KEY = "pretrained_cfg"
# Of the files that are downloaded and digested.
CONFIGURATION_PATTERNS = ("*.json", "*.txt")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON configuration.

    Raises:
        JobError: the file is missing or not a JSON object.
    """
    try:
        config = json.loads(read_whole(path, MAX_DOCUMENT_BYTES))
    except FileNotFoundError:
        raise JobError(f"'{path.parent}' has no {path.name}; is it a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"'{path}' cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise JobError(f"'{path}' is not a JSON object")
    return config


@contextlib.contextmanager
def reading_configuration(address: str) -> Iterator[None]:
    """Turn what a value of a wrong type in a configuration raises into a message that names the model.

    Raises:
        JobError: in place of those errors.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise JobError(f"'{address}': one of its configurations has a value of a wrong type ({error})") from None


def need_file(folder: Path, name: str, address: str, kind: str) -> None:
    """Check that a model's folder has a file.

    Raises:
        JobError: it does not; `kind` says what is expected of the folder.
    """
    if not (folder / name).is_file():
        raise JobError(f"'{address}' has no {name}; {kind} is expected here")


def part_classes(folder: Path) -> dict[str, str]:
    """Class name of every part of a pipeline's folder; a part that is left out has none."""
    index = read_config(folder / PIPELINE_INDEX)
    return {
        name: str(value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(value)
    }
