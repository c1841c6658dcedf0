"""Scores against their definitions in float64, at the edges of float32, and their refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.methods import scores

finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)
logit_rows = st.lists(finite, min_size=3, max_size=12)


def slow_log_p(row: list[float]) -> list[float]:
    """Log-probabilities by the textbook, in exact Python floats."""
    top = max(row)
    log_sum = top + math.log(math.fsum(math.exp(value - top) for value in row))
    return [value - log_sum for value in row]


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-5, abs_tol=1e-5)


@given(logit_rows, st.data())
@settings(max_examples=150, deadline=None)
def test_scores_equal_their_definitions(row, data):
    """Every score against a slow reference; catches a wrong sign, axis, base of the logarithm or overflow at 1e4."""
    classes = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=len(row), unique=True))
    label = data.draw(st.integers(0, len(row) - 1))
    logits, log_p = torch.tensor([row]), slow_log_p(row)
    assert close(scores.risk(logits, torch.tensor([label])).item(), -log_p[label])
    assert close(scores.entropy(logits).item(), -math.fsum(math.exp(one) * one for one in log_p))
    expected = -math.log(len(classes)) - math.fsum(log_p[one] for one in classes) / len(classes)
    assert close(scores.kldb(logits, classes).item(), max(expected, 0))


@given(logit_rows, st.data())
@settings(max_examples=150, deadline=None)
def test_kldb_is_balance_plus_mass(row, data):
    """The decomposition holds for any subset; catches parts computed from another normalisation."""
    classes = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=len(row), unique=True))
    logits = torch.tensor([row])
    balance, mass = scores.kldb_parts(logits, classes)
    assert close((balance + mass).item(), scores.kldb(logits, classes).item())
    assert balance >= 0 and mass >= 0


def test_kldb_is_zero_exactly_on_the_boundary():
    """Uniform on C and nothing elsewhere is zero; any departure is above zero."""
    on_boundary = torch.tensor([[0.0, 0.0, -1e4, -1e4]])
    assert scores.kldb(on_boundary, [0, 1]).item() == pytest.approx(0, abs=1e-7)
    assert scores.kldb(on_boundary + torch.tensor([0.5, 0, 0, 0]), [0, 1]).item() > 1e-3
    assert scores.kldb(torch.zeros(1, 4), [0, 1]).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    """A half precision log-softmax would lose the small probabilities."""
    logits = torch.tensor([[0.0, 12.0, -20.0]], dtype=dtype)
    assert scores.risk(logits, torch.tensor([2])).dtype == torch.float32
    assert scores.risk(logits, torch.tensor([2])).item() == pytest.approx(32.0, abs=1e-3)


@pytest.mark.parametrize("score", ["risk", "kldb", "balance", "mass", "entropy", "conformity"])
def test_gradients_equal_finite_differences(score):
    """Analytic gradients in float64; catches a detached or clamped branch."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, 5, dtype=torch.float64)
    functions = {
        "risk": lambda x: scores.risk(x, torch.tensor([0, 4, 2])),
        "kldb": lambda x: scores.kldb(x, [1, 3]),
        "balance": lambda x: scores.kldb_parts(x, [1, 3])[0],
        "mass": lambda x: scores.kldb_parts(x, [1, 3])[1],
        "entropy": scores.entropy,
        "conformity": lambda x: scores.conformity(x, other),
    }
    assert torch.autograd.gradcheck(functions[score], (logits,))


def test_zero_has_no_sign():
    """A certain prediction has risk, mass and entropy 0.0; -0.0 would stand in every json and table."""
    certain, label = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([0])
    values = [scores.risk(certain, label), scores.entropy(certain), *scores.kldb_parts(certain, [0])]
    assert [math.copysign(1, value.item()) for value in values] == [1, 1, 1, 1]


def test_gradient_survives_extreme_logits():
    """Log of a saturated softmax has no gradient; log-softmax has."""
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    scores.kldb(logits, [1, 2]).sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0.1


@pytest.mark.parametrize("classes", [[], [1, 1], [0, 5], [-1, 0], [[0, 1], [2, 2]]])
def test_bad_subsets_are_refused(classes):
    """Empty, repeated and out-of-range classes would give a number that means nothing."""
    with pytest.raises(ValueError, match="classes"):
        scores.kldb(torch.zeros(2, 5), torch.tensor(classes) if classes and isinstance(classes[0], list) else classes)
    with pytest.raises(ValueError, match="classes"):
        scores.kldb_parts(torch.zeros(2, 5), torch.tensor(classes, dtype=torch.long))


def test_bad_labels_are_refused():
    """A label beyond the classes would read another row's memory or wrap around."""
    with pytest.raises(ValueError, match="labels"):
        scores.risk(torch.zeros(2, 5), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="labels"):
        scores.risk(torch.zeros(1, 5), torch.tensor([0.5]))


def test_subset_of_every_sample():
    """A tensor of subsets scores each sample by its own."""
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    both = scores.kldb(logits, torch.tensor([[0, 1], [2, 4]]))
    assert both[0] == scores.kldb(logits[:1], [0, 1])[0] and both[1] == scores.kldb(logits[1:], [2, 4])[0]


def test_conformity_and_margin():
    """Cosine of un-normalised embeddings; the margin looks at the best other class only."""
    embeds = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert scores.conformity(embeds, torch.tensor([2.0, 0.0])).tolist() == [1.0, 0.0]
    similarities = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.2, 0.4]])
    margin = scores.conformity_margin(similarities, torch.tensor([0, 1]))
    assert margin.tolist() == pytest.approx([0.5, -0.2])
    assert scores.strongest_rival(torch.tensor([[5.0, 1.0, 2.0]]), torch.tensor([0])).tolist() == [2]
