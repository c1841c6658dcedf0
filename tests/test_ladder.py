"""How far a guided trajectory drifts in lower precisions, on a CPU; `tests/gpu` climbs the same ladder on a GPU."""

import pytest

from tests.ladder import TOLERANCES, error_of


@pytest.mark.parametrize("gradient", ["detached", "unet"])
def test_errors_fall_with_precision(gradient):
    """Against float64 by another program: sees a scheduler, decoder or criterion that slipped into low precision."""
    errors = {dtype: error_of("cpu", gradient, dtype) for dtype in ("float32", "bfloat16")}
    assert all(error < TOLERANCES[dtype] for dtype, error in errors.items()), errors
    assert errors["float32"] < errors["bfloat16"] / 100, errors
