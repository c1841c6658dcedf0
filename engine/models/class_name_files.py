"""Class names from a file: of a model's folder, `class_names.txt` or `.json`, or one that settings name. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.models.class_name_checks import check_names, in_index_order
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole

# In a model's folder, with whose other files they are digested; they replace the names of `config.json`.
NAMES_FILES = ("class_names.txt", "class_names.json")


def names_file(folder: Path) -> Path | None:
    """The file with the class names of a model's folder; None where it has none.

    Raises:
        JobError: it has both, or what has the name of one is a folder or the like.
    """
    found = [folder / name for name in NAMES_FILES if os.path.lexists(folder / name)]
    if (wrong := next((path for path in found if not path.is_file()), None)) is not None:
        raise JobError(f"'{wrong}' is not a file; put the class names into a file of that name, or remove it")
    if len(found) > 1:
        raise JobError(f"'{folder}' has {' and '.join(NAMES_FILES)}; keep one of them")
    return found[0] if found else None


def read_names(path: Path) -> list[str]:
    """The class names of a file in index order: a JSON list, or an object by index; else one name a line.

    Raises:
        JobError: it cannot be read, or has a name that cannot be used in a prompt.
    """
    try:
        text = read_whole(path, MAX_RECORD_BYTES).decode("utf-8-sig")
        names: Any = _of_json(text, path) if path.suffix == ".json" else text.rstrip("\r\n").splitlines()
    except UnicodeDecodeError:
        raise JobError(f"'{path}' cannot be read as class names: it is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise JobError(f"'{path}' cannot be read as class names ({error})") from None
    if isinstance(names, dict):
        names = in_index_order(names, f"'{path}'")
    if not isinstance(names, list) or len(names) < 2:
        raise JobError(f"'{path}' does not hold two class names or more; give one a line, or a list in JSON")
    return check_names(names, f"'{path}'")


def _of_json(text: str, path: Path) -> Any:
    remedy = 'give a list of names, as ["cat", "dog"], or an object by index'
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"it is not JSON ({error})"
    except (ValueError, RecursionError):
        problem = "a number in it is too long, or it is nested too deeply"
    raise JobError(f"'{path}' cannot be read as class names: {problem}; {remedy}")


def check_count(names: list[str], path: Path, num_logits: int | None, address: str) -> None:
    """Refuse a file whose names are not as many as the classes of the network.

    Args:
        num_logits: of the network; one stands for two classes, None is not known.

    Raises:
        JobError: there are more or fewer.
    """
    if num_logits is None or len(names) == max(num_logits, 2):
        return
    logits = "one logit, which needs the names of two classes" if num_logits == 1 else f"{num_logits} logits"
    raise JobError(
        f"'{path}' names {len(names)} classes, and '{address}' has {logits} (config.json); name each class once, in"
        " the order of the logits"
    )
