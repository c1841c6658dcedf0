"""CLIP features of the stored samples of a run, which learned rewards are functions of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

from engine.data.images import decode_stored
from engine.driver.progress import Display
from engine.errors import JobError
from engine.job.spec import RuntimeSpec
from engine.methods.finiteness import Faults
from engine.models.clip import Clip
from engine.models.digests import model_digest
from engine.models.hardware import choose_hardware
from engine.models.library_logging import quiet_libraries
from engine.studies.evaluate.extractors import ClipFeatures
from engine.studies.evaluate.image_features import VisionModels, batched
from engine.studies.samples import StudiedRun, read_attempts, read_samples


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampleFeatures:
    """Features of the stored samples of a run.

    Attributes:
        rows: row of each sample by key.
        values: [N, d] CLIP embeddings of length one, float32.
        num_own: of the run itself, the first rows; later ones are of earlier runs.
        clip: address of the CLIP model.
        clip_digest: digest of its files.
    """

    rows: Mapping[str, int]
    values: Tensor
    num_own: int
    clip: str
    clip_digest: str

    def of(self, keys: Sequence[str]) -> Tensor:
        """Features [n, d] of samples by key."""
        return self.values[[self.rows[key] for key in keys]]


def image_checksums(run: StudiedRun) -> dict[str, str]:
    """Checksum of the image file of every sample by key, empty where none is stored.

    Raises:
        CorruptShardError: a parquet of the run is not whole.
    """
    names = [request.name for request in run.job.requests]
    return {row["key"]: row["sha256"] for row in read_attempts(run, names, ["key", "sha256"])}


def embed_samples(
    run: StudiedRun, display: Display, before: Sequence[StudiedRun] = (), named: Collection[str] = ()
) -> SampleFeatures:
    """Embed all stored samples by the CLIP model of the run's job.

    Args:
        before: earlier runs.
        named: keys of the samples of earlier runs that are embedded too.

    Raises:
        JobError: the model cannot be loaded, or gives no usable embedding of an image.
        CorruptShardError: a shard is not whole.
    """
    address = run.job.models.clip
    display.phase("loading the CLIP model")
    quiet_libraries()
    try:
        clip, digest = Clip.load(address, choose_hardware(RuntimeSpec()).device), model_digest(address)
    except JobError as error:
        raise JobError([f"models.clip: {problem}" for problem in error.problems]) from None
    models = VisionModels(clip, ClipFeatures(address))
    total = sum(record.counts.ok for record in run.commits)
    keys: list[str] = []
    parts: list[Tensor] = []

    def take(images: Iterable[tuple[str, PIL.Image.Image]]) -> int:
        for batch in batched(images):
            display.advance(f"embedding samples: {min(len(keys), total)}/{total}")
            keys.extend(key for key, _ in batch)
            parts.append(_embeds(models, batch))
        return len(keys)

    num_own = take(_images(run))
    take(image for one in before for image in _images(one) if image[0] in named)
    return SampleFeatures(
        rows={key: row for row, key in enumerate(keys)},
        values=torch.cat(parts),
        num_own=num_own,
        clip=address,
        clip_digest=digest,
    )


def _images(run: StudiedRun) -> Iterator[tuple[str, PIL.Image.Image]]:
    for data, record in read_samples(run, [request.name for request in run.job.requests]):
        yield record["key"], decode_stored(data, f"{run.store.uri}: the image of '{record['key']}'")


def _embeds(models: VisionModels, batch: Sequence[tuple[str, PIL.Image.Image]]) -> Tensor:
    faults = Faults(len(batch))
    embeds = models.embeds([image for _, image in batch], faults)
    for row, (key, _) in enumerate(batch):
        if faults[row]:
            raise JobError(f"RUN: '{key}': {faults[row]}; no reward can be learned on it, replace the model")
    return torch.from_numpy(embeds)
