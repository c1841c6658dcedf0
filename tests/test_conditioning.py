"""Class distributions, error predictor and screening, by their properties on synthetic embeddings."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.methods.conditioning.gaussians import ClassGaussians, ClassMoments
from engine.methods.conditioning.mixtures import ClassMixtures, MixtureOptions, fit_mixtures
from engine.methods.conditioning.predictor import (
    ErrorPredictor,
    PredictorOptions,
    fit_predictor,
    outcome_weights,
    train_predictor,
)
from engine.methods.conditioning.predictor_evaluation import PredictorEvaluation, auc_interval, evaluate
from engine.methods.conditioning.screening import (
    ScreeningOptions,
    embedding_generator,
    screen,
    unscreened,
)
from engine.methods.conditioning.screening_tally import ScreeningTally
from engine.methods.sampling.noise import draw_noise
from tests.conftest import REPOSITORY

LABELS = ("ant", "bee", "cat")
DIM = 16


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(number: int, seed: int = 0, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw embeddings [N, d] with entries of very different size, and classes [N]."""
    scale = torch.logspace(-2, 1, DIM)
    return (torch.randn(number, DIM, generator=seeded(seed)) + shift) * scale, torch.arange(number) % len(LABELS)


def separable(number: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, errors on one side of a plane (about one in six), classes."""
    embeds, classes = images(number)
    margin = (embeds / torch.logspace(-2, 1, DIM))[:, :4].sum(1) / 2
    errors = margin + noise * torch.randn(number, generator=seeded(9)) > 1
    return embeds, errors, classes


def moments_of(embeds: torch.Tensor, classes: torch.Tensor) -> ClassMoments:
    moments = ClassMoments.empty(LABELS, embeds.shape[1])
    moments.add(embeds, classes)
    return moments


def gaussians() -> ClassGaussians:
    return ClassGaussians.of(moments_of(*images(90)))


@dataclasses.dataclass
class FirstIsLarge:
    """A stand-in for a predictor: the confidence grows with the first entry, and is a half at `level` deviations."""

    level: float = 0.0
    calls: int = 0

    def confidence(self, embeds):
        self.calls += 1
        return torch.sigmoid(100 * embeds[:, 0] - self.level)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_moments_merge_exactly_for_any_split_and_order(data):
    """Equal to torch's variance of everything at once, also far from zero, where a sum of squares loses all digits."""
    shift = data.draw(st.sampled_from([0.0, 1e4]))
    number = data.draw(st.integers(6, 40))
    embeds, classes = images(number, seed=data.draw(st.integers(0, 99)), shift=shift)
    order = torch.tensor(data.draw(st.permutations(range(number))))
    cuts = sorted(data.draw(st.lists(st.integers(0, number), max_size=5)))
    parts = [moments_of(embeds[rows], classes[rows]) for rows in order.tensor_split(cuts)]
    merged = ClassMoments.empty(LABELS, DIM)
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    for index in range(len(LABELS)):
        rows = embeds[classes == index].double()
        assert merged.count[index] == len(rows)
        assert torch.allclose(merged.mean[index], rows.mean(0), rtol=1e-13, atol=1e-15)
        expected = torch.var(rows, dim=0, unbiased=False)
        assert torch.allclose(merged.squares[index] / len(rows), expected, rtol=1e-9, atol=1e-15)


def test_moments_stream_and_resume_from_their_state():
    """Additions batch by batch, with a store and a load between them, leave no trace; the stored state is its own."""
    embeds, classes = images(60)
    moments = moments_of(embeds[:7], classes[:7])
    state = moments.state()
    resumed = ClassMoments.from_state(state)
    for rows in torch.arange(7, 60).split(11):
        resumed.add(embeds[rows], classes[rows])
    whole = moments_of(embeds, classes)
    assert torch.allclose(resumed.mean, whole.mean) and torch.allclose(resumed.squares, whole.squares)
    assert torch.equal(state["mean"], moments_of(embeds[:7], classes[:7]).mean)


def test_moments_of_other_classes_are_not_merged():
    """Another order of labels would silently mix classes."""
    for other in (ClassMoments.empty(LABELS[::-1], DIM), ClassMoments.empty(LABELS, DIM + 1)):
        with pytest.raises(ValueError, match="cannot be merged"):
            moments_of(*images(9)).merge(other)
    with pytest.raises(ValueError, match="entries"):
        moments_of(*images(9)).add(torch.zeros(1, DIM + 1), torch.zeros(1, dtype=torch.long))


def test_gaussian_draws_follow_mean_and_deviation():
    """Moments of many draws against the class's own; catches the variance in place of the deviation."""
    found, generator = gaussians(), seeded(1)
    draws = torch.stack([found.draw(1, generator) for _ in range(4000)])
    error = (draws.mean(0) - found.mean[1]) / found.std[1]
    assert error.abs().max() < 5 / math.sqrt(4000)
    assert (draws.std(0) / found.std[1] - 1).abs().max() < 0.06
    expected = found.mean[1] + found.std[1] * torch.randn(DIM, generator=seeded(5))
    assert torch.equal(found.draw(1, seeded(5)), expected)


def distributions(kind: str, embeds: torch.Tensor, classes: torch.Tensor):
    if kind == "gaussians":
        return ClassGaussians.of(moments_of(embeds, classes))
    return fit_mixtures(embeds, classes, LABELS)


@pytest.mark.parametrize("kind", ["gaussians", "mixtures"])
def test_classes_without_a_spread_are_refused_by_name(kind):
    """No image, a single one, and copies of one: each would give the same embedding for ever."""
    embeds = torch.randn(2, DIM, generator=seeded(0))[[0] * 7 + [1]]
    found = distributions(kind, embeds, torch.tensor([0] * 7 + [1]))
    for index, reason in enumerate([r"class 0 \('ant'\).*alike", r"class 1 \('bee'\).*one image", "class 2.*no image"]):
        for refused in (found.check, lambda one: found.draw(one, seeded(0))):
            with pytest.raises(ValueError, match=reason):
                refused(index)
    for unknown in (-1, 3):
        with pytest.raises(ValueError, match=f"class {unknown} is not"):
            found.draw(unknown, seeded(0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused_by_class(value):
    """One NaN would make a class's mean NaN, and every image drawn from it black."""
    embeds, classes = images(30)
    embeds[4, 2] = value
    for use in (
        lambda: moments_of(embeds, classes),
        lambda: fit_mixtures(embeds, classes, LABELS),
        lambda: fit_predictor(embeds, classes == 0, classes, LABELS),
    ):
        with pytest.raises(ValueError, match=r"class 1 \('bee'\): 1 embeddings are not finite"):
            use()


@pytest.mark.parametrize("classes", [torch.tensor([0.0]), torch.tensor([3]), torch.tensor([-1]), torch.tensor([0, 1])])
def test_bad_classes_are_refused(classes):
    """A class beyond the labels would wrap around to another."""
    with pytest.raises(ValueError, match="class"):
        moments_of(torch.zeros(1, DIM), classes)


def three_modes(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Modes at -8, 0 and 8 in every entry, with deviations .5, 1 and .5."""
    which = torch.arange(number) % 3
    noise = torch.randn(number, DIM, generator=seeded(2)) * torch.tensor([0.5, 1.0, 0.5])[which, None]
    return (which[:, None] - 1.0) * 8 + noise, torch.full((number,), 1)


def test_a_mixture_recovers_three_separated_modes():
    """Means, deviations and weights of the modes; and draws fall into the modes, none between them."""
    found = fit_mixtures(*three_modes(150), LABELS)
    order = found.means[1].mean(1).argsort()
    assert torch.allclose(found.means[1][order].mean(1), torch.tensor([-8.0, 0.0, 8.0]), atol=0.2)
    assert torch.allclose(found.stds[1][order].mean(1), torch.tensor([0.5, 1.0, 0.5]), atol=0.1)
    assert torch.allclose(found.weights[1], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert found.notes() == []
    generator = seeded(3)
    centres = torch.stack([found.draw(1, generator) for _ in range(600)]).mean(1)
    modes = (centres / 8).round()
    assert (centres - 8 * modes).abs().max() < 1.5
    assert all(abs(int((modes == mode).sum()) - 200) < 50 for mode in (-1, 0, 1))


def test_a_mixture_falls_back_where_images_are_few_and_says_so():
    """Twelve images are one component, equal to the Gaussian; a lone outlier does not get a component of its own."""
    embeds, _ = three_modes(12)
    found = fit_mixtures(embeds, torch.zeros(12, dtype=torch.long), LABELS, MixtureOptions(reg_covar=1e-9))
    assert found.num_components.tolist() == [1, 0, 0]
    (note,) = found.notes()
    assert note.startswith("class 0 ('ant'): 1 instead of 3 components; 12 images")
    assert torch.allclose(found.stds[0, 0], embeds.std(0, correction=0), rtol=1e-5)
    outlier = torch.cat([torch.randn(59, DIM, generator=seeded(4)), torch.full((1, DIM), 100.0)])
    found = fit_mixtures(outlier, torch.zeros(60, dtype=torch.long), LABELS, MixtureOptions(components=2))
    assert found.num_components[0] == 1


def test_a_mixture_is_no_worse_off_with_copies():
    """Two images, thirty copies of each: components without a spread would draw only the copies."""
    embeds = torch.cat([torch.zeros(30, DIM), torch.ones(30, DIM)])
    found = fit_mixtures(embeds, torch.zeros(60, dtype=torch.long), LABELS)
    assert found.num_components[0] == 1 and found.stds[0, 0].min() > 0.4


@pytest.mark.parametrize("options", [{"components": 0}, {"min_images_per_component": 1}])
def test_impossible_mixtures_are_refused(options):
    """Options name the field and its value."""
    with pytest.raises(ValueError, match=next(iter(options))):
        MixtureOptions(**options)


@pytest.mark.parametrize("standardise", [True, False])
def test_separable_errors_are_learned(standardise):
    """Entries differ a thousandfold in size; the AUC on images that were not trained on must be nearly perfect."""
    embeds, errors, classes = separable(1200)
    embeds = embeds if standardise else embeds / torch.logspace(-2, 1, DIM)
    fit = fit_predictor(embeds, errors, classes, LABELS, PredictorOptions(standardise=standardise))
    pooled = fit.evaluation.pooled
    assert pooled.auc > 0.95 and pooled.recall > 0.8 and pooled.precision > 0.6
    assert pooled.auc_low > 0.9
    assert fit.verdict.startswith("better than chance: AUC ") and not fit.advice


def test_noise_is_said_to_be_near_chance():
    """Errors that have nothing to do with the embedding: a 95 % interval may miss 0.5 once in twenty, not more."""
    embeds, classes = images(600)
    fits = []
    for seed in range(8):
        errors = torch.rand(600, generator=seeded(seed)) < 0.2
        fits.append(fit_predictor(embeds, errors, classes, LABELS, PredictorOptions(seed=seed, epochs=5)))
    near = [fit for fit in fits if fit.evaluation.pooled.verdict.startswith("near chance")]
    assert len(near) >= 7
    assert all("method: risky" in fit.advice and "more images" in fit.advice for fit in near)
    assert all(fit.verdict.startswith("near chance: AUC 0.") and "includes 0.5" in fit.verdict for fit in near)


def test_a_handful_of_errors_is_not_called_chance():
    """Three held-out errors say neither that the predictor is good nor that it is not."""
    errors = torch.arange(40) < 3
    judged = evaluate(torch.randn(40, generator=seeded(3)), errors, torch.zeros(40, dtype=torch.long), LABELS)
    assert judged.pooled.verdict.startswith("too few errors to tell: AUC ")


def test_scores_below_chance_are_not_called_better():
    """An inverted predictor is informative about the split, not about errors."""
    errors = torch.arange(100) < 50
    evaluation = evaluate(-errors.double(), errors, torch.zeros(100, dtype=torch.long), LABELS)
    assert evaluation.pooled.auc == 0 and evaluation.pooled.verdict.startswith("worse than chance")


@given(st.lists(st.booleans(), min_size=2, max_size=200).filter(lambda flags: 0 < sum(flags) < len(flags)))
@settings(max_examples=50, deadline=None)
def test_weights_follow_the_balance(flags):
    """[1, n_ok / n_err]: both outcomes weigh the same in all."""
    errors = torch.tensor(flags)
    right, error = outcome_weights(errors).tolist()
    assert right == 1 and error * sum(flags) == pytest.approx(len(flags) - sum(flags))


def test_rare_errors_weigh_as_much_as_the_rest():
    """Without the weights the mean confidence would be the error rate (0.1), and nothing would pass a half."""
    errors = torch.arange(400) % 10 == 0
    same = torch.ones(400, 4)
    predictor = train_predictor(same, errors, PredictorOptions(standardise=False))
    assert predictor.confidence(same[:1]).item() == pytest.approx(0.5, abs=0.15)


def test_targets_that_cannot_be_predicted_are_a_result():
    """No traceback for a target that is always right, always wrong, or wrong once."""
    embeds, classes = images(30)
    right = torch.zeros(30, dtype=torch.bool)
    once = torch.arange(30) == 3
    for errors, reason in [
        (right, "the target makes no error on 30 images"),
        (~right, "the target errs on all of 30 images"),
        (once, "the target makes 1 error on 30 images; 2 are needed, one of them to be held out"),
        (~once, "the target is right once on 30 images; 2 are needed, one of them to be held out"),
    ]:
        fit = fit_predictor(embeds, errors, classes, LABELS)
        assert fit.predictor is None and fit.evaluation is None
        assert fit.verdict == f"cannot be trained: {reason}"
    assert fit_predictor(embeds, classes == 0, classes, LABELS).predictor is not None
    with pytest.raises(ValueError, match="one boolean an image"):
        fit_predictor(embeds, classes, classes, LABELS)


def test_held_out_images_mirror_the_whole():
    """A quarter of the errors and a quarter of the others, over all classes; none for training, none twice."""
    embeds, classes = images(240)
    errors = torch.arange(240) % 5 == 0
    evaluation = fit_predictor(embeds, errors, classes, LABELS, PredictorOptions(epochs=1)).evaluation
    assert (evaluation.pooled.num_errors, evaluation.pooled.num_right) == (12, 48)
    assert [quality.num_errors for quality in evaluation.per_class] == [4, 4, 4]
    assert [quality.num_right for quality in evaluation.per_class] == [16, 16, 16]


def test_classes_are_judged_only_where_there_are_errors_enough():
    """A class's AUC on three errors means nothing: counts and plain words in its place."""
    classes = torch.arange(90) % 3
    errors = (classes == 1) & (torch.arange(90) < 45) | (torch.arange(90) == 0) | (classes == 2)
    ant, bee, cat = evaluate(torch.linspace(1, -1, 90).double(), errors, classes, LABELS).per_class
    assert (ant.auc, ant.verdict) == (None, "too few errors (1 held out, 10 needed)")
    assert bee.auc == 1 and bee.num_errors == 15 and bee.name == "class 1 ('bee')"
    assert (cat.auc, cat.verdict) == (None, "too few images without error (0 held out, 10 needed)")


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_interval_of_the_auc(num_errors, num_right, auc):
    """Around the estimate, inside [0, 1], and 0.5 outside exactly where the Mann-Whitney test would reject it."""
    low, high = auc_interval(auc, num_errors, num_right)
    assert 0 <= low <= auc + 1e-9 and auc - 1e-9 <= high <= 1
    null_deviation = math.sqrt((num_errors + num_right + 1) / (12 * num_errors * num_right))
    distance = abs(auc - 0.5) / null_deviation
    if abs(distance - 1.96) > 1e-3:
        assert (low <= 0.5 <= high) == (distance < 1.96)


def test_a_perfect_auc_on_few_images_is_not_certain():
    """The usual variance is zero at 1, so that two images would prove anything."""
    low, high = auc_interval(1.0, 2, 2)
    assert low < 0.5 and high == 1
    assert auc_interval(1.0, 200, 800)[0] > 0.98


def test_confidence_does_not_depend_on_neighbours():
    """Row by row, in reverse or all at once: equal bits."""
    embeds, errors, _ = separable(200)
    predictor = train_predictor(embeds, errors, PredictorOptions(epochs=2))
    together = predictor.confidence(embeds)
    assert torch.equal(together, torch.cat([predictor.confidence(row[None]) for row in embeds]))
    assert torch.equal(together, predictor.confidence(embeds.flip(0)).flip(0))
    with pytest.raises(ValueError, match=r"takes \[B, 16\]"):
        predictor.confidence(embeds[:, :3])


def test_training_leaves_the_global_randomness_alone():
    """Training beside a sampler must not move the sampler's draws."""
    embeds, errors, _ = separable(200)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    train_predictor(embeds, errors, PredictorOptions(epochs=1))
    assert torch.equal(before, torch.random.get_rng_state())


@given(st.integers(0, 2**53 - 1), st.floats(0, 0.99), st.integers(1, 40), st.sampled_from([-3.0, 0.0, 2.0, 50.0]))
@settings(max_examples=60, deadline=None)
def test_screening_never_passes_what_the_predictor_refuses(seed, threshold, max_draws, level):
    """A passed draw is above the threshold, a marked one is the best of all; draws never exceed their bound."""
    found, predictor = gaussians(), FirstIsLarge(level)
    draw = screen(found, predictor, 1, seed, ScreeningOptions(threshold=threshold, max_draws=max_draws))
    generator = embedding_generator(seed)
    every = torch.stack([found.draw(1, generator) for _ in range(max_draws)])
    confidence = predictor.confidence(every)
    assert draw.screened == bool((confidence > threshold).any()) == (draw.confidence > threshold)
    expected = int((confidence > threshold).int().argmax()) if draw.screened else int(confidence.argmax())
    assert torch.equal(draw.embedding, every[expected])
    assert draw.num_draws == (expected + 1 if draw.screened else max_draws)


def test_screening_does_not_depend_on_chunks_or_neighbours():
    """Any chunk size, a trained predictor, samples in any order: the same embedding, bit by bit."""
    embeds, errors, _ = separable(300)
    predictor = train_predictor(embeds, errors, PredictorOptions(epochs=3))
    found = gaussians()
    alone = {seed: screen(found, predictor, 0, seed) for seed in range(12)}
    for chunk_size in (1, 5, 64, 1000):
        for seed in reversed(range(12)):
            again = screen(found, predictor, 0, seed, ScreeningOptions(chunk_size=chunk_size))
            assert torch.equal(again.embedding, alone[seed].embedding)
            assert (again.num_draws, again.confidence) == (alone[seed].num_draws, alone[seed].confidence)
    assert max(draw.num_draws for draw in alone.values()) > 1


def test_screening_stops_at_the_first_draw_that_passes():
    """An easy predictor is asked once; the ablation without screening is the first draw of the same stream."""
    predictor = FirstIsLarge(level=-1e9)
    draw = screen(gaussians(), predictor, 2, 7)
    assert (predictor.calls, draw.num_draws, draw.screened) == (1, 1, True)
    assert torch.equal(draw.embedding, unscreened(gaussians(), 2, 7))


def test_embeddings_are_another_stream_than_the_noise():
    """Equal streams would make the embedding a copy of the first latents."""
    noise = draw_noise([5], (DIM,))[0][0]
    assert not torch.allclose(torch.randn(DIM, generator=embedding_generator(5)), noise)


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"threshold": -0.1}, {"max_draws": 0}, {"chunk_size": 0}])
def test_impossible_screening_is_refused(options):
    """A threshold of 1 can never be exceeded; options name the field and its value."""
    with pytest.raises(ValueError, match=next(iter(options))):
        ScreeningOptions(**options)


def tally_of(draws) -> ScreeningTally:
    tally = ScreeningTally()
    for class_index, draw in draws:
        tally.add(class_index, screened=draw.screened, num_draws=draw.num_draws)
    return tally


def test_tallies_add_up():
    """Acceptance per class over shards: any grouping gives the same figures."""
    found = gaussians()
    draws = [(seed % 3, screen(found, FirstIsLarge(1.0), seed % 3, seed)) for seed in range(12)]
    whole, parts = tally_of(draws), ScreeningTally()
    for some in (draws[5:], [], draws[:5]):
        parts.add_rows(json.loads(json.dumps(tally_of(some).rows())))
    assert parts == whole
    count = whole.per_class[0]
    assert count.num_samples == 4 and count.acceptance_rate == count.num_screened / count.num_draws
    assert ScreeningTally().per_class == {}


def through_plain_values(state: dict) -> dict:
    """What a file would keep: tensors as they are, everything else through JSON."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    return json.loads(json.dumps(plain, allow_nan=False)) | tensors


def test_states_restore_everything():
    """Stored and restored parts answer with equal bits; a state of another kind is refused."""
    embeds, errors, classes = separable(300, noise=0.3)
    fit = fit_predictor(embeds, errors, classes, LABELS, PredictorOptions(epochs=2))
    restored = ErrorPredictor.from_state(through_plain_values(fit.predictor.state()))
    assert torch.equal(restored.confidence(embeds), fit.predictor.confidence(embeds))
    assert PredictorEvaluation.from_state(through_plain_values(fit.evaluation.state())) == fit.evaluation
    found = fit_mixtures(embeds, classes, LABELS)
    again = ClassMixtures.from_state(through_plain_values(found.state()))
    assert again.labels == LABELS and again.dim == DIM
    assert torch.equal(again.draw(2, seeded(0)), found.draw(2, seeded(0)))
    with pytest.raises(ValueError, match="error_predictor"):
        ErrorPredictor.from_state(found.state())
    with pytest.raises(ValueError, match="mixtures"):
        ClassMixtures.from_state(fit.predictor.state())


def reproduced() -> list[list[float]]:
    """Draws that hang on the seeds of training, mixtures and screening."""
    embeds, errors, classes = separable(300)
    predictor = train_predictor(embeds, errors, PredictorOptions(epochs=2, seed=3))
    found = fit_mixtures(embeds, classes, LABELS)
    return [screen(found, predictor, 1, 2**52 + seed).embedding.tolist() for seed in range(3)]


def test_seeds_give_equal_results_in_another_process():
    """Training, mixtures and draws again in a fresh interpreter with another hash seed: equal floats."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()});"
        "from tests.test_conditioning import reproduced; print(reproduced())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(REPOSITORY)}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == reproduced()
