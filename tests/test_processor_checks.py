"""Image processors and networks of transformers: each gives plain transformers' logits, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    AutoImageProcessor,
    _load_backend_class,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForImageClassification,
)

from engine.errors import JobError
from engine.models.classifier import Classifier
from engine.models.classifier_checks import check_classifier
from engine.models.preprocessing import Preprocessing
from engine.models.processor_checks import _size_problems, check_processor, is_finite_number
from engine.models.processor_classes import CLASS_OF_MODEL, DEFAULTS, FIXED_SIZE_MODELS, plain_name
from tests.model_cases import as_tensor, photographs

TYPES = {
    kind: plain_name(IMAGE_PROCESSOR_MAPPING_NAMES[kind]["pil"])
    for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if "pil" in IMAGE_PROCESSOR_MAPPING_NAMES.get(kind, {}) and kind != "timm_wrapper"
}
REFUSED = sorted(set(TYPES.values()) - set(DEFAULTS))
OTHERS = [
    "DetrImageProcessor", "Mask2FormerImageProcessor", "VideoMAEImageProcessor", "SamImageProcessor",
    "NoImageProcessor", "LayoutLMv3ImageProcessorFast", "DPTFeatureExtractor",
]  # fmt: skip
LABELS = {0: "cat", 1: "dog", 2: "ship", 3: "truck", 4: "frog"}


def write(folder: Path, settings: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_is_known_of_a_class_is_what_transformers_has(kind: str) -> None:
    """A file may be silent on any option: the class decides then."""
    actual, known = _load_backend_class(kind, "pil", False), DEFAULTS[kind]
    size = {"height": known.size, "width": known.size} if "height" in actual.size else {"shortest_edge": known.size}
    assert actual.size == size and int(actual.resample) == known.resample
    assert bool(getattr(actual, "do_center_crop", False)) == known.crops and actual.default_to_square == known.square
    assert actual.do_resize and actual.do_rescale and actual.rescale_factor == 1 / 255
    assert bool(getattr(actual, "do_normalize", False)) == known.normalizes and not getattr(actual, "do_pad", False)
    assert getattr(actual, "crop_pct", None) == known.crop_pct
    crop = known.crop_size and {"height": known.crop_size, "width": known.crop_size}
    assert getattr(actual, "crop_size", None) == crop and not getattr(actual, "rescale_offset", False)


def test_every_class_of_a_classifier_is_known_or_refused(tmp_path: Path) -> None:
    """All types of models that transformers classifies images with, by the class that it takes for them."""
    assert {kind: name for kind, name in TYPES.items() if name in DEFAULTS} == CLASS_OF_MODEL | {
        kind: name for kind, name in TYPES.items() if name in DEFAULTS and kind not in CLASS_OF_MODEL
    }
    assert set(CLASS_OF_MODEL) == {kind for kind, name in TYPES.items() if name in DEFAULTS}
    for name in [*REFUSED, *OTHERS]:
        with pytest.raises(JobError, match=f"image_processor_type: '{plain_name(name)}' is not supported"):
            check_processor(write(tmp_path / name, {"image_processor_type": name}), "x")


SMALL = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
VARIANTS: dict[str, dict[str, Any]] = {
    "as the class has it": {},
    "edges": {"size": {"height": 24, "width": 24}},
    "other edges": {"size": {"height": 24, "width": 32}},
    "shorter edge": {"size": {"shortest_edge": 28}},
    "one number": {"size": 28},
    "a list": {"size": [24, 30]},
    "crop": {"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 24, "width": 20}},
    "crop in one number": {"size": {"height": 30, "width": 30}, "do_center_crop": True, "crop_size": 24},
    "crop with a border": {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 24},
    "no crop": {"size": {"shortest_edge": 28}, "do_center_crop": False},
    "no resize": {"do_resize": False, "do_center_crop": False},
    "bilinear": {"size": {"shortest_edge": 28}, "resample": 2},
    "bicubic": {"size": {"height": 28, "width": 28}, "resample": 3},
    "no normalisation": {"size": {"shortest_edge": 28}, "do_normalize": False},
    "no conversion": {"size": {"shortest_edge": 28}, "do_convert_rgb": False},
    "large shorter edge": {"size": {"shortest_edge": 384}, "crop_pct": 0.8},
    "share": {"size": {"shortest_edge": 28}, "crop_pct": 0.9},
    "channels turned": {"size": {"shortest_edge": 28}, "do_flip_channel_order": True},
    "channels not turned": {"size": {"shortest_edge": 28}, "do_flip_channel_order": False},
    "divided once": {"size": {"height": 28, "width": 28}, "include_top": False},
    "null": dict.fromkeys(("do_rescale", "do_center_crop", "crop_size", "do_pad", "resample", "crop_pct", "size")),
    "factor in float32": {"size": {"shortest_edge": 28}, "rescale_factor": 0.003921568859368563},
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_both_paths_give_what_transformers_gives_or_the_file_is_refused(kind: str, tmp_path: Path) -> None:
    """Every class with every variant of its options: exact on images, and the same to rounding on tensors."""
    images, num_followed = photographs((40, 40), (33, 50)), 0
    for name, variant in VARIANTS.items():
        folder = write(tmp_path / name.replace(" ", "-"), {"image_processor_type": kind} | SMALL | variant)
        try:
            preprocessing = Preprocessing.load(folder)
        except JobError:
            continue
        num_followed += 1
        plain = AutoImageProcessor.from_pretrained(folder, backend="pil")
        for image in images:
            expected = plain(images=[image], return_tensors="pt")["pixel_values"]
            assert torch.equal(preprocessing.of_images([image]), expected), name
            ours = preprocessing.of_tensor(as_tensor(image))
            assert ours.shape == expected.shape and ((ours - expected) * preprocessing._std).abs().mean() < 1 / 255, (
                name
            )
    assert num_followed >= 10, "a check that refuses everything tests nothing"


OLD_NAMES = [
    ("image_processor_type", "ViTFeatureExtractor"),
    ("image_processor_type", "ViTImageProcessorFast"),
    ("image_processor_type", "ViTImageProcessorPil"),
    ("feature_extractor_type", "ViTFeatureExtractor"),
    ("feature_extractor_type", "ViTImageProcessor"),
]


@pytest.mark.parametrize(("field", "name"), OLD_NAMES)
@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_class_is_found_by_every_name_it_had(kind: str, field: str, name: str, tmp_path: Path) -> None:
    """transformers 4 wrote `image_processor_type: ViTFeatureExtractor` too, which `AutoImageProcessor` of 5 refuses."""
    [image] = photographs((40, 48))
    plain = write(tmp_path / "plain", {"image_processor_type": kind, "size": 28})
    old = write(tmp_path / "old", {field: name.replace("ViT", kind.removesuffix("ImageProcessor")), "size": 28})
    expected = AutoImageProcessor.from_pretrained(plain, backend="pil")(images=[image], return_tensors="pt")
    assert torch.equal(Preprocessing.load(old).of_images([image]), expected["pixel_values"])


NULLS = (
    "do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "do_convert_rgb", "do_flip_channel_order",
    "rescale_factor", "resample", "size", "crop_size", "image_mean", "image_std", "crop_pct", "include_top",
)  # fmt: skip


@pytest.mark.parametrize("kind", DEFAULTS)
def test_null_is_followed_or_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    """Null is not the default of the class: transformers takes it literally."""
    [image] = photographs((40, 48))
    for field in NULLS:
        folder = write(tmp_path / field, {"image_processor_type": kind, "size": 28, field: None})
        try:
            check_processor(folder, "x")
        except JobError as error:
            assert f"preprocessor_config.json: {field}: None" in str(error)
            continue
        expected = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=[image], return_tensors="pt")
        assert torch.equal(Preprocessing.load(folder).of_images([image]), expected["pixel_values"]), field


WRONG: dict[str, dict[str, Any]] = {
    "resample": {"resample": 1},
    "rescale_factor": {"rescale_factor": 1 / 127.5},
    "do_rescale": {"do_rescale": False},
    "do_pad": {"do_pad": True},
    "rescale_offset": {"rescale_offset": True},
    "image_mean": {"image_mean": [0.5]},
    "image_std": {"image_std": [0.5, 0.0, 0.5]},
    "crop_size": {"do_center_crop": True, "crop_size": {"shortest_edge": 24}},
    "size": {"size": {"longest_edge": 24}},
    "auto_map": {"auto_map": {"AutoImageProcessor": "own.Processor"}},
}
MORE_WRONG: list[tuple[str, dict[str, Any]]] = [
    *WRONG.items(),
    *(("resample", {"resample": value}) for value in (0, 4, 5, 7, "lanczos")),
    *(("size", {"size": value}) for value in (
        {"max_height": 20, "max_width": 20}, {"shortest_edge": 20, "longest_edge": 30}, {"height": 24}, -1, 0, "24",
        [24], {"height": 24.5, "width": 24}, {"min_pixels": 9, "max_pixels": 99},
    )),
    *(("image_mean", {"image_mean": value}) for value in (0.5, [0.5, 0.5], ["a", "b", "c"], [0.5, 0.5, None])),
    *(("rescale_factor", {"rescale_factor": value}) for value in (1, 0, 1 / 256, "1/255")),
    ("do_rescale", {"do_rescale": 0}),
    ("crop_size", {"do_center_crop": True}),
    ("size", {"size": {"height": 24, "width": 24, "longest_edge": None}}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "change"), MORE_WRONG, ids=[json.dumps(change)[:50] for _, change in MORE_WRONG])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_options_that_are_not_followed_are_refused_by_name(
    field: str, change: dict[str, Any], file: str, tmp_path: Path
) -> None:
    """By the file alone, wherever transformers takes it from."""
    settings: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 24, "width": 24},
    } | change
    if file == "processor_config.json":
        # The nested one is taken, whatever file is next to it.
        write(tmp_path, {"image_processor_type": "ViTImageProcessor"})
        settings = {"processor_class": "CLIPProcessor", "image_processor": settings}
    with pytest.raises(JobError, match=rf"'x': {file}.*: {field}: "):
        check_processor(write(tmp_path, settings, file), "x")


@pytest.mark.parametrize("kind", ["ConvNextImageProcessor", "PoolFormerImageProcessor"])
def test_a_crop_is_a_fraction_of_the_edge(kind: str, tmp_path: Path) -> None:
    """transformers would divide by zero, or enlarge a crop."""
    settings = {"image_processor_type": kind, "size": {"shortest_edge": 24}}
    for share in (0, -0.5, 1.01, 10**400, "0.9", [0.9]):
        with pytest.raises(JobError, match=r"crop_pct: .* is not a fraction of the edge"):
            check_processor(write(tmp_path, settings | {"crop_pct": share}), "x")
    for share in (1, 0.9, 0.01):
        assert check_processor(write(tmp_path, settings | {"crop_pct": share}), "x") == kind


def test_the_edge_from_which_nothing_is_cropped_needs_no_crop(tmp_path: Path) -> None:
    """ConvNext's `crop_pct` is not read there, and may be null."""
    settings = {"image_processor_type": "ConvNextImageProcessor", "crop_pct": None}
    for edge in (384, 500):
        check_processor(write(tmp_path, settings | {"size": {"shortest_edge": edge}}), "x")
    with pytest.raises(JobError, match="crop_pct: None"):
        check_processor(write(tmp_path, settings | {"size": {"shortest_edge": 383}}), "x")


@pytest.mark.parametrize("content", [None, "", "[]", "{", "null", '{"image_processor_type": 3}'])
def test_a_missing_or_unreadable_processor_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(JobError, match=r"preprocessor_config\.json"):
        check_processor(tmp_path, "x")


# Networks ------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VIT: dict[str, Any] = LAYERS | {"image_size": 32, "patch_size": 8}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
TINY: dict[str, dict[str, Any]] = {
    "beit": VIT | {"use_absolute_position_embeddings": True},
    "bit": {"embedding_size": 8, "depths": [1, 1], "hidden_sizes": [32, 32], "num_groups": 4},
    "clip": {"vision_config": VIT, "text_config": LAYERS, "projection_dim": 16},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "deit": VIT,
    "dinov2": VIT | {"mlp_ratio": 1},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "ijepa": VIT,
    "levit": {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1],
              "key_dim": [4, 4, 4]},
    "metaclip_2": {"vision_config": VIT, "text_config": LAYERS, "projection_dim": 16},
    "mobilenet_v1": {"depth_multiplier": 0.1, "min_depth": 4},
    "mobilenet_v2": {"depth_multiplier": 0.1, "min_depth": 4},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 16], "image_size": 32},
    "poolformer": STAGES | {"num_encoder_blocks": 4},
    "pvt": STAGES | {"image_size": 32, "num_labels": 5, "num_attention_heads": [1, 1, 1, 1]},
    "regnet": {"embedding_size": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "groups_width": 4},
    "resnet": {"embedding_size": 8, "depths": [1, 1], "hidden_sizes": [8, 16]},
    "segformer": STAGES | {"num_attention_heads": [1, 1, 1, 1]},
    "siglip": {"vision_config": VIT, "text_config": LAYERS},
    "swin": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "vit": VIT,
    "vit_msn": VIT,
}  # fmt: skip


def tiny(kind: str, folder: Path, size: int) -> Path:
    """A classifier of a type with random weights, and the processor that transformers takes for it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, id2label=LABELS, label2id={b: a for a, b in LABELS.items()}, **TINY[kind]
    )
    name = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
    model = getattr(transformers, name if isinstance(name, str) else name[0])(config)
    model.eval().save_pretrained(folder)
    processor: dict[str, Any] = {"image_processor_type": TYPES[kind], "size": {"height": size, "width": size}}
    if TYPES[kind] == "ConvNextImageProcessor":
        processor["size"] = {"shortest_edge": size}
    return write(folder, processor | {"crop_size": {"height": size, "width": size}})


@pytest.mark.parametrize("kind", TINY)
def test_a_network_gives_plain_transformers_logits(kind: str, tmp_path: Path) -> None:
    """By both paths: on the stored image, and on the tensor that guidance sees."""
    size = 64 if kind == "levit" else 32
    folder, images = tiny(kind, tmp_path / kind, size), photographs((size, size), (size, size))
    check_classifier(folder, "x")
    classifier = Classifier.load(str(folder))
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    with torch.no_grad():
        expected = model(**processor(images=images, return_tensors="pt")).logits
        ours = classifier.logits(torch.cat([as_tensor(image) for image in images]))
    assert torch.equal(classifier.score(images), expected) and classifier.labels == list(LABELS.values())
    assert torch.allclose(ours, expected, atol=0.05 * float(expected.std()) + 1e-3)


@pytest.mark.parametrize("kind", TINY)
def test_an_input_that_does_not_fit_is_refused_by_the_files_or_at_the_latest_when_loaded(
    kind: str, tmp_path: Path
) -> None:
    """Position embeddings of one size: by the files for the types that have only these."""
    wrong = 96 if kind == "levit" else 48
    folder = tiny(kind, tmp_path / kind, wrong)
    if kind in FIXED_SIZE_MODELS:
        with pytest.raises(JobError, match=r"size: makes images of 48 x 48 pixels, and the network takes 32 x 32"):
            check_classifier(folder, "x")
        return
    check_classifier(folder, "x")
    model = AutoModelForImageClassification.from_pretrained(folder)
    try:
        model(pixel_values=torch.zeros(1, 3, wrong, wrong))
    except Exception:
        with pytest.raises(JobError, match="cannot be loaded as a classifier of images"):
            Classifier.load(str(folder))
        return
    Classifier.load(str(folder))


@pytest.mark.parametrize(("size", "is_right"), [((8, 8), True), ((8, 4), False), ((4, 8), False)])
def test_both_edges_are_those_of_the_network(size: tuple[int, int], is_right: bool) -> None:
    """Position embeddings are as many as both of them ask for."""
    settings = {"do_resize": True, "do_center_crop": False, "size": {"height": size[0], "width": size[1]}}
    problems = _size_problems(settings, "ViTImageProcessor", {"model_type": "vit", "image_size": 8})
    assert (problems == []) == is_right and all(f"{size[0]} x {size[1]} pixels" in text for text in problems)


def test_a_number_of_json_may_be_larger_than_any_float() -> None:
    assert [is_finite_number(value) for value in (10**400, -(10**400), float("inf"), 1.5, 2, True, "1")] == [
        False, False, False, True, True, False, False,
    ]  # fmt: skip
