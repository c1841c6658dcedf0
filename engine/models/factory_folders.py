"""Folders of retrained factories: the factory's name, its classes and temperature, and the weights that it takes.

`factory.json` and `model.safetensors`. Such a folder holds no code: the factory is imported as any other, called, and
given the weights. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from engine.errors import JobError
from engine.job.plan import MAX_TEMPERATURE, MIN_TEMPERATURE
from engine.methods.config_values import is_number
from engine.methods.strict_json import parse_json
from engine.models.factories import is_factory
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole

FACTORY_DOCUMENT = "factory.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFactory:
    """A factory whose weights are in a folder.

    Attributes:
        factory: `package.module:factory`.
        labels: class names that it had when the weights were stored.
        temperature: in place of that of the factory's settings.
    """

    folder: Path
    factory: str
    labels: tuple[str, ...]
    temperature: float

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.folder / WEIGHTS


def as_factory_folder(address: str) -> Path | None:
    """The folder of a retrained factory that an address names, or None if it names none."""
    if address.startswith("zoo:"):
        return None
    try:
        folder = Path(address).expanduser()
        return folder if (folder / FACTORY_DOCUMENT).is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def runs_code(address: str) -> bool:
    """Whether loading what an address names runs code of the user: a factory, or a folder that names one."""
    return is_factory(address) or as_factory_folder(address) is not None


def read_factory_folder(address: str) -> StoredFactory | None:
    """What a folder of a retrained factory says; None where the address names none.

    Raises:
        JobError: its document is damaged.
    """
    folder = as_factory_folder(address)
    if folder is None:
        return None
    path = folder / FACTORY_DOCUMENT
    try:
        raw = parse_json(read_whole(path, MAX_RECORD_BYTES))
        factory, labels, temperature = raw["factory"], raw["labels"], raw["temperature"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"'{path}' cannot be read ({type(error).__name__}: {error}); retrain again") from None
    is_valid = (
        isinstance(factory, str)
        and is_factory(factory)
        and isinstance(labels, list)
        and all(isinstance(label, str) for label in labels)
        and is_number(temperature)
        and MIN_TEMPERATURE <= temperature < MAX_TEMPERATURE
    )
    if not is_valid:
        raise JobError(f"'{path}' does not name a factory, its classes and a temperature; retrain again")
    return StoredFactory(folder=folder, factory=factory, labels=tuple(labels), temperature=float(temperature))


def write_factory_document(stored: StoredFactory) -> None:
    """Write the document of a folder, which holds the weights."""
    fields = {"factory": stored.factory, "labels": list(stored.labels), "temperature": stored.temperature}
    text = json.dumps(fields, indent=1, ensure_ascii=False)
    (stored.folder / FACTORY_DOCUMENT).write_text(f"{text}\n", encoding="utf-8")
