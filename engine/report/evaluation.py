"""The results of `riskforge evaluate`, as they are stored in `evaluation.json` and as the report shows them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.data.run.file_names import EVALUATION
from engine.data.run.kept_documents import read_kept
from engine.data.stores.base import Store

_IMAGE = r"^data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]*$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(_Part):
    """A figure with its interval."""

    value: float
    low: float
    high: float


class Shown(_Part):
    """An image in the report.

    Attributes:
        image: its place in `Evaluation.images`; empty where it cannot be shown.
        name: key of a sample, or where a real image came from.
        text: its caption.
        is_sample: whether it is of the run, so that the gallery may have it.
    """

    image: str
    name: str
    text: str
    is_sample: bool


class Source(_Part):
    """Images from outside of the run, as they were read."""

    address: str
    kind: str
    num_images: int
    num_unusable: int
    unusable: tuple[str, ...]


class Quality(_Part):
    """How near a request's images are to others, with equally many of each class on both sides.

    Attributes:
        num_images: on either side.
        skipped: why there are no figures; empty where there are.
    """

    request: str
    num_images: int
    kid: Interval | None = None
    frechet: Interval | None = None
    precision: Interval | None = None
    recall: Interval | None = None
    skipped: str = ""


class Qualities(_Part):
    """The requests against one other set, with the name of the features.

    Attributes:
        against: the set in words.
    """

    against: str
    features: str
    requests: tuple[Quality, ...]


class TextScore(_Part):
    """CLIPScore of a request's images."""

    request: str
    num_images: int
    score: Interval


class TextScores(_Part):
    """CLIPScore under a model; circular where it is the model that may have guided the samples."""

    model: str
    is_circular: bool
    requests: tuple[TextScore, ...]


class Pair(_Part):
    """A sample and the training image nearest to it."""

    sample: Shown
    training: Shown
    clip_distance: float
    pixel_distance: float
    is_suspect: bool


class Copies(_Part):
    """How near the samples of a request come to training images."""

    request: str
    num_images: int
    clip_distance_median: float
    pixel_distance_median: float
    num_suspects: int | None = None
    suspects: Interval | None = None


class Thresholds(_Part):
    """Distances below which a sample is suspect: so near to training images is one held-out image in a hundred.

    Attributes:
        num_shared: held-out images that are training images themselves, and left out.
        num_suspects: held-out images that are below both thresholds.
    """

    num_held_out: int
    num_shared: int
    clip_distance: float
    pixel_distance: float
    clip_distance_median: float
    pixel_distance_median: float
    num_suspects: int


class Memorisation(_Part):
    """The training images nearest to samples."""

    model: str
    train: Source
    thresholds: Thresholds | None
    requests: tuple[Copies, ...]
    pairs: tuple[Pair, ...]


class Slice(_Part):
    """A cluster of failures.

    Attributes:
        texts: texts that its images are nearer to than all samples are, with the difference of the cosines.
        confusions: conditioned class, predicted class, count; the most frequent ones.
        neighbourhood: error rate of all samples as near to its centre as its own are.
    """

    texts: tuple[tuple[str, float], ...]
    num_failures: int
    share: float
    neighbourhood: Interval
    num_neighbours: int
    confusions: tuple[tuple[str, str, int], ...]
    requests: tuple[tuple[str, int], ...]
    prototypes: tuple[Shown, ...]


class Slices(_Part):
    """The failures in clusters.

    Attributes:
        which: `accepted` or `all` failures.
        error_rate: of all samples that were read, for comparison.
        silhouette: of the clusters; between -1 and 1, and near 0 where failures are no clusters at all.
        skipped: why there are no clusters; empty where there are.
    """

    which: str
    model: str
    num_failures: int
    num_samples: int
    error_rate: float
    silhouette: float | None = None
    slices: tuple[Slice, ...] = ()
    skipped: str = ""


class Row(_Part):
    """Images in a row, with their title."""

    title: str
    images: tuple[Shown, ...]


class Extremes(_Part):
    """Real images and samples at both ends of a score.

    Attributes:
        median_real, median_samples: of the score; None without an image.
    """

    title: str
    score: Literal["kldb", "risk"]
    num_real: int
    num_samples: int
    median_real: float | None
    median_samples: float | None
    rows: tuple[Row, ...]


class Evaluation(_Part):
    """The content of `evaluation.json`.

    Attributes:
        num_attempts: rows of the metadata that it was made of; another number means that the run went on since.
        left_out: samples that a model gives values for that are not finite: how many, and which model.
        images: data URIs by place.
    """

    study: Literal["evaluate"] = "evaluate"
    document_version: Literal[1] = 1
    plan_digest: str
    num_attempts: int
    limit: int
    seed: int
    real: Source | None
    samples: dict[str, int]
    left_out: tuple[str, ...] = ()
    quality: tuple[Qualities, ...]
    text_scores: TextScores | None
    memorisation: Memorisation | None
    slices: Slices
    extremes: tuple[Extremes, ...]
    images: dict[str, Annotated[str, Field(pattern=_IMAGE)]]


def read_evaluation(store: Store) -> Evaluation | None:
    """The results of the last evaluation of a run, or None.

    Raises:
        CorruptShardError: it cannot be read.
    """
    return read_kept(store, EVALUATION, Evaluation, "an evaluation", f"riskforge evaluate {store.uri}")
