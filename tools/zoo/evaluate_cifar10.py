"""Measure the embedded zoo `cifar10` on test images and on samples of its pipelines.

    uv run python tools/zoo/evaluate_cifar10.py --data DATA --zoo engine/zoo/cifar10

Writes `figures.json` into the zoo and contact sheets into `docs/`. Test images are those kept for figures; samples
start from fixed seeds. The referee is a ResNet-32 trained by others, which no generator or reader has learnt from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_autoencoder import reconstruct
from cifar10_captions import UNSEEN_BY_TARGET
from cifar10_contexts import Thresholds, close_ups, measure, middles
from cifar10_data import CLASS_NAMES, blur, check_data, load_test, load_train
from cifar10_probes import (
    COLUMNS,
    ContextReader,
    balanced_labels,
    from_starts,
    kept_starts,
    memorisation,
    obedience,
    prompts_of,
    save_blind_sheet,
)
from cifar10_readers import TEACHER, ExportedClassifier, Teacher
from classifiers import predict_logits
from clip_model import zero_shot_classes
from drawing import (
    Bytes,
    Sampling,
    load_pipeline,
    load_unclip,
    part_sizes,
    percent,
    sample,
    sample_variations,
    save_sheet,
)
from numpy.typing import NDArray
from publishing import unwritable
from residual_networks import ResidualNetwork
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from engine.studies.evaluate.distances import kernel_distance

SAMPLING = Sampling(guidance_scale=5.0)
VARIATIONS = Sampling(num_inference_steps=20, guidance_scale=3.0)
CLASSIFIERS = ("classifier", TEACHER, "oracle", "oracle-b")
CLIPS = ("clip", "judge")
# Parts and files of a zoo that are measured.
NEEDED = (*CLASSIFIERS, *CLIPS, "stable-diffusion", "stable-unclip", "classes.json", "contexts.json")
JOINT = (("cat", "dog"), ("airplane", "ship"))
NUM_JOINT = 200
NUM_STARTS = 400
NUM_VARIATIONS = 400
NUM_OBEYING = 200
ClassReader = Callable[[Bytes], NDArray[np.int64]]


def kid_x1000(first: Tensor, second: Tensor) -> float:
    """Kernel inception distance of features [N, d], [M, d], times 1,000."""
    return round(1000 * kernel_distance(first.double().numpy(), second.double().numpy()).value, 2)


def readers(zoo: Path, referee: ResidualNetwork) -> dict[str, ClassReader]:
    """Everything that reads a class from an image, by name."""
    found: dict[str, ClassReader] = {"resnet32": lambda images: referee.read(images)[1]}
    for name in CLASSIFIERS:
        found[name] = _classifier_reader(ExportedClassifier(zoo / name))
    for name in CLIPS:
        clip, tokenizer = CLIPModel.from_pretrained(zoo / name), CLIPTokenizer.from_pretrained(zoo / name)
        found[name] = _clip_reader(clip, tokenizer)
    return found


def _classifier_reader(model: ExportedClassifier) -> ClassReader:
    return lambda images: predict_logits(model, images).argmax(-1).numpy()


def _clip_reader(clip: CLIPModel, tokenizer: CLIPTokenizer) -> ClassReader:
    return lambda images: zero_shot_classes(clip, tokenizer, images, CLASS_NAMES)


def agreement(
    found: dict[str, ClassReader], images: Bytes, labels: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any]:
    """Share of images that each reader sees as labelled; of the referee by class too."""
    hits = {name: reader(images) == labels for name, reader in found.items()}
    figures: dict[str, Any] = {name: percent(hit) for name, hit in hits.items()}
    by_class = {name: percent(hits["resnet32"][labels == CLASS_NAMES.index(name)]) for name in names}
    return figures | {"resnet32 by class": by_class}


class Evaluation:
    """The zoo, the images it is measured on, and everything that reads them.

    Args:
        zoo: its folder.
        data_folder: holds `cifar10/` and `classifiers/`.
        count: samples of prompts alone.
    """

    def __init__(self, zoo: Path, data_folder: Path, count: int) -> None:
        self.zoo, self.data_folder, self.count = zoo, data_folder, count
        self.names: list[str] = json.loads((zoo / "classes.json").read_text())
        self.referee, self.test = ResidualNetwork("resnet32", data_folder, "cpu"), load_test(data_folder, "reported")
        self.known = self.test.of_classes(self.names)
        self.readers, self.teacher = readers(zoo, self.referee), Teacher(zoo / TEACHER)
        self.thresholds = Thresholds(**json.loads((zoo / "contexts.json").read_text()))
        self.pipeline, self.unclip = load_pipeline(zoo), load_unclip(zoo)

    def figures(self, docs: Path) -> dict[str, Any]:
        """All figures, printed as they come."""
        figures: dict[str, Any] = {}

        def add(name: str, value: Any) -> None:
            figures[name] = value
            print(json.dumps({name: value}), flush=True)

        add("test images, ten classes", {name: percent(read(self.test.images) == self.test.labels)
                                         for name, read in self.readers.items()})  # fmt: skip
        add("test images, trained classes", self.agreement(self.known.images, self.known.labels))
        add("classifier by context", self.by_context())
        add("reconstruction", self.reconstructions())
        add("joint prompts", self.joint_prompts())
        labels = balanced_labels(self.names, self.count)
        drawn = sample(self.pipeline, prompts_of(labels), SAMPLING, seed=1000)
        add("samples", self.agreement(drawn, labels) | {"kid_resnet32_features_x1000": self.distance(drawn)})
        train = load_train(self.data_folder).of_classes(self.names)
        add("memorisation", memorisation(drawn, train, self.known, self.referee, docs / "cifar10-nearest.png"))
        add("variations", self.variations())
        add("real starts", kept_starts(self.pipeline, self.referee, self.known, SAMPLING, NUM_STARTS))
        reader = ContextReader(train, self.teacher, self.thresholds)
        add("distance and side read of test images", reader.accuracy(self.known))
        add("contexts obeyed", obedience(self.pipeline, self.names, reader, SAMPLING, NUM_OBEYING))
        # Not every second image: classes are interleaved.
        halves = [self.referee.read(part)[0] for part in np.array_split(self.known.images, 2)]
        add("kid of two halves of the test images", kid_x1000(*halves))
        add("bytes", part_sizes(self.zoo))
        return figures

    def agreement(self, images: Bytes, labels: NDArray[np.int64]) -> dict[str, Any]:
        """Share of images that each reader sees as labelled."""
        return agreement(self.readers, images, labels, self.names)

    def distance(self, drawn: Bytes) -> float:
        """Kernel inception distance to the test images of the trained classes, times 1,000."""
        return kid_x1000(self.referee.read(drawn)[0], self.referee.read(self.known.images)[0])

    def by_context(self) -> dict[str, dict[str, Any]]:
        """What target and oracles read of ten classes, in the contexts that the target never saw and in others.

        Dark images and green grounds are those of the test set; all of them are blurred, and cut to close-ups.
        """
        images, labels = self.test.images, self.test.labels
        contexts = self.thresholds.contexts(measure(images))
        phrases = [set(contexts.phrases(row)) for row in range(len(contexts))]
        near = close_ups(images, middles(self.teacher.activation(images, labels)))
        groups = {"blurry": (blur(images), labels), "close up": (near, labels)}
        for phrase in sorted(UNSEEN_BY_TARGET - groups.keys()):
            chosen = np.array([phrase in said for said in phrases])
            groups[phrase] = images[chosen], labels[chosen]
        seen = np.array([UNSEEN_BY_TARGET.isdisjoint(said) for said in phrases])
        groups["seen"] = images[seen], labels[seen]
        return {
            name: {"count": len(own), **{reader: percent(self.readers[reader](some) == own) for reader in CLASSIFIERS}}
            for name, (some, own) in groups.items()
            if len(own)
        }

    def variations(self) -> dict[str, Any]:
        """Variations of test images: who agrees with the class of the original."""
        rows = np.random.default_rng(0).permutation(len(self.known.labels))[:NUM_VARIATIONS]
        labels = self.known.labels[rows]
        drawn = sample_variations(self.unclip, self.known.images[rows], prompts_of(labels), VARIATIONS, seed=1000)
        return self.agreement(drawn, labels) | {"kid_resnet32_features_x1000": self.distance(drawn)}

    def joint_prompts(self) -> dict[str, Any]:
        """How the referee reads samples of prompts that name two classes."""
        figures: dict[str, Any] = {}
        for names in (pair for pair in JOINT if set(pair) <= set(self.names)):
            read = self.referee.read(sample(self.pipeline, [" and ".join(names)] * NUM_JOINT, Sampling(), seed=5000))[1]
            figures[" and ".join(names)] = {name: percent(read == CLASS_NAMES.index(name)) for name in names}
        return figures

    def reconstructions(self) -> dict[str, float]:
        """What the referee reads of test images before and after the autoencoder."""
        decoded = reconstruct(self.pipeline.vae, self.known.images)
        error = (decoded.astype(float) - self.known.images) / 255
        return {
            "resnet32_on_originals": percent(self.referee.read(self.known.images)[1] == self.known.labels),
            "resnet32_on_reconstructions": percent(self.referee.read(decoded)[1] == self.known.labels),
            "psnr_db": round(float(-10 * np.log10(np.mean(error**2))), 1),
        }

    def save_sheets(self, docs: Path) -> None:
        """`cifar10.png`: samples, two rows of joint prompts last; the others: originals above what came of them."""
        labels = np.sort(balanced_labels(self.names, 8 * COLUMNS))
        joint = [" and ".join(names) for names in JOINT if set(names) <= set(self.names) for _ in range(COLUMNS)]
        drawn = sample(self.pipeline, prompts_of(labels) + joint, SAMPLING, seed=1000)
        save_sheet(drawn[: len(drawn) // COLUMNS * COLUMNS].reshape(-1, COLUMNS, 32, 32, 3), docs / "cifar10.png")
        count = min(4 * COLUMNS, len(self.known.labels) // COLUMNS * COLUMNS)
        images, labels = self.known.images[:count], self.known.labels[:count]
        varied = sample_variations(self.unclip, images, prompts_of(labels), VARIATIONS, seed=1000)
        self._save_pairs(images, varied, docs / "cifar10-variations.png")
        started = from_starts(self.pipeline, images, prompts_of(labels), SAMPLING, seed=4000)
        self._save_pairs(images, started, docs / "cifar10-starts.png")

    def _save_pairs(self, above: Bytes, below: Bytes, path: Path) -> None:
        pairs = np.stack([part.reshape(-1, COLUMNS, 32, 32, 3) for part in (above, below)], axis=1)
        save_sheet(pairs.reshape(-1, COLUMNS, 32, 32, 3), path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and classifiers/")
    parser.add_argument("--zoo", type=Path, default=Path("engine/zoo/cifar10"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the contact sheets")
    parser.add_argument("--blind", type=Path, help="folder for a sheet of cats and dogs to be named, and its key")
    parser.add_argument("--count", type=int, default=1000, help="samples of prompts alone")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if missing := [name for name in NEEDED if not (arguments.zoo / name).exists()]:
        parser.error(f"--zoo: {arguments.zoo} has no {', '.join(missing)}; train_cifar10.py --output writes all parts")
    check_data(arguments.data)
    if problem := unwritable(arguments.docs):
        parser.error(f"--docs: {problem}")
    torch.set_num_threads(arguments.threads)
    evaluation = Evaluation(arguments.zoo, arguments.data, arguments.count)
    if arguments.blind:
        arguments.blind.mkdir(parents=True, exist_ok=True)
        sheet, key = arguments.blind / "cats-and-dogs.png", arguments.blind / "cats-and-dogs.txt"
        save_blind_sheet(evaluation.pipeline, SAMPLING, sheet, key)
    figures = evaluation.figures(arguments.docs)
    (arguments.zoo / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    evaluation.save_sheets(arguments.docs)


if __name__ == "__main__":
    main()
