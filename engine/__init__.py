"""Riskforge: manufactures labelled images on which a classifier fails or hesitates.

The names below are the public face: what programs of users import, listed in `docs/extending.md`. Every other path
inside `engine`, but `engine.digits`, is free to move. Each is imported when first asked for: `--help` waits for none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.data.images import LabelledImage, Unusable, open_images
    from engine.data.reading.corpus import Corpus, open_run
    from engine.errors import RiskforgeError
    from engine.methods.custom.criterion import Criterion
    from engine.methods.guidance.scene import Scene
    from engine.methods.scores import conformity, conformity_margin, entropy, kldb, kldb_parts, risk, strongest_rival

__version__ = "0.1.0"
__all__ = [
    "Corpus",
    "Criterion",
    "LabelledImage",
    "RiskforgeError",
    "Scene",
    "Unusable",
    "conformity",
    "conformity_margin",
    "entropy",
    "kldb",
    "kldb_parts",
    "open_images",
    "open_run",
    "risk",
    "strongest_rival",
]

_SCORES = "engine.methods.scores"
_MODULES = {
    "Corpus": "engine.data.reading.corpus",
    "Criterion": "engine.methods.custom.criterion",
    "LabelledImage": "engine.data.images",
    "RiskforgeError": "engine.errors",
    "Scene": "engine.methods.guidance.scene",
    "Unusable": "engine.data.images",
    "open_images": "engine.data.images",
    "open_run": "engine.data.reading.corpus",
    **dict.fromkeys(
        ("conformity", "conformity_margin", "entropy", "kldb", "kldb_parts", "risk", "strongest_rival"), _SCORES
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
