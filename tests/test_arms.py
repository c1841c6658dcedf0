"""Arms and the ways of keeping what a network could: records, batches, attack, arithmetic, distillation."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from engine.errors import JobError
from engine.studies.retrain.arm_records import (
    ARMS,
    DEFAULT_ARMS,
    DEFAULT_STRENGTHS,
    PROTECTIONS,
    ArmChoice,
    Protection,
    parse_arm,
)
from engine.studies.retrain.batch_changes import Attack, Augmentation
from engine.studies.retrain.finetune import Recipe, Samples
from engine.studies.retrain.protection import Distillation, combine
from engine.studies.retrain.trainer import ArmTrainer

RECIPE = Recipe(num_steps=25, batch_size=16, num_generated=6, learning_rate=0.02)
BOUNDS = (torch.tensor([-1.0, -2.0, 0.0]).reshape(1, 3, 1, 1), torch.tensor([1.0, 2.0, 1.0]).reshape(1, 3, 1, 1))


class Network(nn.Module):
    """A small classifier with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(pixels)).relu().mean((2, 3)))


def samples(number: int, seed: int, shift: float = 0.0) -> Samples:
    """Images whose class is the brightest of four patches."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(number, 3, 8, 8, generator=generator) * 2 - 1 + shift
    classes = pixels[:, :, ::4, ::4].mean(1).flatten(1).argmax(1)
    return Samples(pixels, torch.eye(4)[classes])


@pytest.fixture(scope="module")
def trainer() -> ArmTrainer:
    torch.manual_seed(0)
    network = Network().train()
    for seed in range(5):
        network(samples(32, seed).pixels)
    return ArmTrainer(network=network.eval(), real=samples(60, 1), recipe=RECIPE, bounds=BOUNDS)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = state_of(first), state_of(second)
    return all(torch.equal(ours[name], theirs[name]) for name in ours if ours[name].is_floating_point())


# Records -------------------------------------------------------------------------------------------------------------


def test_arms_are_found_by_name_and_number():
    """`random` is another name of `unfiltered`; a typo is answered with the name that is meant."""
    assert set(DEFAULT_ARMS) < set(ARMS) and parse_arm("random") == parse_arm("unfiltered") == ArmChoice(
        ARMS["unfiltered"]
    )
    assert parse_arm("accepted:30") == ArmChoice(ARMS["accepted"], 30) and parse_arm("random:7").label == "unfiltered:7"
    for text, message in (
        ("acepted", "--arm: there is no arm 'acepted'; did you mean 'accepted'?"),
        ("before", "--arm: there is no arm 'before'"),
        ("accepted:", "--arm: 'accepted:' names no number of samples"),
        ("accepted:0", "names no number of samples"),
        ("accepted:-3", "names no number of samples"),
        ("accepted:³", "names no number of samples"),
        ("accepted:99999999999", "names no number of samples"),
        ("augment:30", "asks for generated samples, and augment has none; give augment"),
    ):
        with pytest.raises(JobError, match=r".") as refused:
            parse_arm(text)
        assert message in refused.value.problems[0]


def test_strengths_have_their_range():
    """Defaults are in it; what is outside is named with it."""
    assert all(not Protection(kind=kind).problems() for kind in PROTECTIONS)
    assert all(not Protection(kind=kind, strength=DEFAULT_STRENGTHS[kind]).problems() for kind in PROTECTIONS[1:])
    for kind, strength, message in (
        ("average", 1.5, "--protect-weight: 1.5 is not above 0 and up to 1"),
        ("average", 0.0, "0 is not above 0"),
        ("distill", float("nan"), "nan is not above 0"),
        ("none", 0.5, "0.5 has no meaning without --protect"),
        ("averge", None, "--protect: 'averge' is none of none, distill, average, arithmetic; did you mean 'average'?"),
    ):
        assert message in Protection(kind=kind, strength=strength).problems()[0]


# Batches -------------------------------------------------------------------------------------------------------------


def test_augmented_images_are_mixtures_of_shifted_ones():
    """Shares of an image and of its target are the same; shifts reach their limit and no further; seeds decide all."""
    ramp = torch.arange(16.0).repeat(200, 3, 16, 1) + 100 * torch.arange(200.0)[:, None, None, None]
    batch = Samples(ramp, torch.eye(200))
    moved = Augmentation(alpha=1e-9).of(batch, np.random.default_rng(0))
    # With alpha near zero every mixture is one image; which one, its target says.
    sources = moved.targets.argmax(1)
    offsets = moved.pixels[:, 0, 8, 8] - 100 * sources - 8
    assert torch.allclose(moved.targets.max(1).values, torch.ones(200))
    assert set(offsets.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert torch.equal(moved.pixels[:, 0, 8, 0], (100 * sources + offsets.clamp(min=0)).float())
    mixed = Augmentation(shift=0.0, alpha=1.0).of(batch, np.random.default_rng(0))
    expected = torch.einsum("bc,cxyz->bxyz", mixed.targets, ramp)
    assert torch.allclose(mixed.pixels, expected, atol=2e-2) and (mixed.targets > 0).sum() > 350
    assert torch.equal(mixed.pixels, Augmentation(shift=0.0, alpha=1.0).of(batch, np.random.default_rng(0)).pixels)


def test_flips_are_asked_for():
    """About half of the images, left to right; none by default, as a mirrored digit is another one."""
    ramp = Samples(torch.arange(8.0).repeat(200, 3, 8, 1), torch.ones(200, 1))
    for flips, least, most in ((False, 0, 0), (True, 70, 130)):
        changed = Augmentation(shift=0.0, alpha=1e-9, flips=flips).of(ramp, np.random.default_rng(1))
        assert least <= int((changed.pixels[:, 0, 0, 0] == 7).sum()) <= most


def test_attacked_images_are_near_and_harder(trainer):
    """Within eps of the range of each channel and within black and white; the loss rises; statistics stay."""
    network, batch = copy.deepcopy(trainer.network), samples(40, 3)
    before = state_of(network)
    attack = Attack(eps=0.05, num_steps=4)
    network.train()
    found = attack.of(BOUNDS, network, batch, np.random.default_rng(0))
    assert network.training and not found.pixels.requires_grad and torch.equal(found.targets, batch.targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    inside = torch.maximum(torch.minimum(batch.pixels, BOUNDS[1]), BOUNDS[0])
    moved = (found.pixels - inside).abs().amax((0, 2, 3))
    reach = 0.05 * (BOUNDS[1] - BOUNDS[0]).flatten()
    assert (moved <= reach + 1e-6).all() and (moved > 0.9 * reach).all()
    assert (found.pixels <= BOUNDS[1]).all() and (found.pixels >= BOUNDS[0]).all()
    network.eval()
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, batch.pixels.shape)).float()
    random = batch.pixels + reach[None, :, None, None] * noise
    with torch.no_grad():
        losses = [
            float(cross_entropy(network(pixels), batch.targets)) for pixels in (batch.pixels, random, found.pixels)
        ]
    assert losses[2] > losses[0] and losses[2] > losses[1]
    stronger = Attack(eps=0.2, num_steps=4).of(BOUNDS, network, batch, np.random.default_rng(0))
    with torch.no_grad():
        assert float(cross_entropy(network.eval()(stronger.pixels), batch.targets)) > losses[2]


def test_arms_train_on_what_they_change(trainer):
    """Each arm of real images alone gives another network; equal seeds give equal ones; the old one stays."""
    before = state_of(trainer.network)
    trained = {arm: trainer.train(arm, None, seed=3) for arm in ("none", "augment", "pgd")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.state_dict().items())
    for arm, network in trained.items():
        assert not network.training and same(network, trainer.train(arm, None, seed=3))
        assert not same(network, trained["none"]) or arm == "none"
    assert not same(trained["augment"], trained["pgd"])


# Protection ----------------------------------------------------------------------------------------------------------


def protected(trainer: ArmTrainer, kind: str, strength: float) -> ArmTrainer:
    return dataclasses.replace(trainer, protection=Protection(kind=kind, strength=strength))


def test_averages_lie_between_old_and_new(trainer):
    """At weight one it is the new network, at 0.25 a quarter of the way; variances by their logarithms."""
    generated = samples(20, 2, 0.3)
    old, new = state_of(trainer.network), state_of(trainer.train("accepted", generated, seed=1))
    whole = state_of(protected(trainer, "average", 1.0).train("accepted", generated, seed=1))
    part = state_of(protected(trainer, "average", 0.25).train("accepted", generated, seed=1))
    for name, tensor in new.items():
        assert torch.allclose(whole[name], tensor, atol=1e-6)
        if name == "norm.running_var":
            assert torch.allclose(
                part[name].log(), old[name].log() + 0.25 * (tensor.log() - old[name].log()), atol=1e-6
            )
        elif tensor.is_floating_point():
            assert torch.allclose(part[name], 0.75 * old[name] + 0.25 * tensor, atol=1e-6)
        else:
            assert torch.equal(part[name], tensor)


def test_arithmetic_adds_what_the_samples_alone_change(trainer):
    """The arm without samples is the old network, exactly; with them, the drift of its twin is taken away."""
    generated = samples(20, 2, 0.3)
    ours = protected(trainer, "arithmetic", 0.5)
    old, alone = state_of(trainer.network), state_of(trainer.train("none", None, seed=1))
    new = state_of(trainer.train("accepted", generated, seed=1))
    found = state_of(ours.train("accepted", generated, seed=1))
    assert same(ours.train("none", None, seed=1), trainer.network)
    for name in ("convolution.weight", "head.bias", "norm.weight", "norm.running_mean"):
        assert torch.allclose(found[name], old[name] + 0.5 * (new[name] - alone[name]), atol=1e-6)
    ratio = (new["norm.running_var"] / alone["norm.running_var"]) ** 0.5
    assert torch.allclose(found["norm.running_var"], old["norm.running_var"] * ratio, rtol=1e-5)
    # The base of a seed does not depend on what was trained before.
    assert same(
        dataclasses.replace(ours).train("accepted", generated, seed=1), ours.train("accepted", generated, seed=1)
    )


def test_variances_stay_positive(trainer):
    """Where the samples make a variance smaller by more than it was, and where channels are dead."""
    old, new, base = (copy.deepcopy(trainer.network) for _ in range(3))
    old.norm.running_var.copy_(torch.tensor([0.1, 0.1, 0.0, 0.1, 0.1, 0.1]))
    new.norm.running_var.copy_(torch.tensor([0.1, 1.0, 0.0, 0.0, 1.0, 1.0]))
    base.norm.running_var.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    found = combine(old, new, base, 1.0).norm.running_var
    assert (found >= 0).all() and torch.isfinite(found).all()
    assert found[[0, 1, 2, 5]].tolist() == pytest.approx([0.01, 0.1, 0.0, 0.1])


def test_shared_weights_are_combined_once():
    """A network that has one tensor under two names."""
    nets = []
    for value in (1.0, 3.0, 1.0):
        first = nn.Linear(2, 2, bias=False)
        second = nn.Linear(2, 2, bias=False)
        second.weight = first.weight
        nn.init.constant_(first.weight, value)
        nets.append(nn.Sequential(first, second))
    assert (combine(*nets, 0.5)[0].weight == 2.0).all()


def test_distillation_holds_predictions_near_the_old_ones(trainer):
    """Its loss is the divergence from old to new; the stronger, the less predictions on real images move."""
    pixels = trainer.real.pixels
    with torch.no_grad():
        logits = trainer.network(pixels)
    assert float(Distillation(trainer.network, 2.0).loss(pixels, logits)) == pytest.approx(0, abs=1e-6)
    p, q = logits.softmax(1), torch.zeros_like(logits).softmax(1)
    by_hand = 2.0 * float((p * (p / q).log()).sum(1).mean())
    assert float(Distillation(trainer.network, 2.0).loss(pixels, torch.zeros_like(logits))) == pytest.approx(
        by_hand, rel=1e-4
    )
    for arm, generated in (("accepted", samples(20, 2, 0.3)), ("pgd", None)):
        moved = []
        for strength in (1e-6, 10.0, 100.0):
            network = protected(trainer, "distill", strength).train(arm, generated, seed=2)
            with torch.no_grad():
                moved.append(float(Distillation(trainer.network, 1.0).loss(pixels, network(pixels))))
        assert moved[0] > moved[1] > moved[2]
