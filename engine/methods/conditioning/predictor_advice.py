"""What to do about an error predictor that nothing shows to be of use. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# With fewer errors of the target, a predictor that is of use often cannot be told from chance.
ENOUGH_ERRORS = 50
_WITHOUT = "leave the screened request out, set screening: false, or use method: risky without conditioning"


def predictor_advice(num_errors: int, auc_low: float | None) -> str:
    """What to do, in words; empty where the predictor is better than chance.

    Args:
        num_errors: errors of the target on the images that it was prepared from.
        auc_low: lower end of the interval of its AUC; None where it could not be trained.
    """
    if auc_low is not None and auc_low > 0.5:
        return ""
    if num_errors < ENOUGH_ERRORS:
        cause = f"prepare from more images: the target errs on {num_errors} of these, and {ENOUGH_ERRORS} or more are"
        return f"{cause} needed; until then {_WITHOUT}"
    return f"screening by it would select nothing; {_WITHOUT}, or prepare with another encoder or more images"


def advice_in(document: Mapping[str, Any]) -> str:
    """The same of a stored artefact by its document, which may be of an earlier version.

    Raises:
        KeyError, TypeError: it is not such a document.
    """
    evaluation = document["predictor"]["evaluation"]
    low = evaluation["pooled"]["auc_low"] if evaluation else None
    return predictor_advice(sum(document["errors"]), low)
