"""The options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import JobError

DEFAULT_LIMIT = 2000
# Thumbnails and pixels of so many images take a few hundred megabytes.
MAX_LIMIT = 20_000
MIN_IMAGES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """The options of `riskforge evaluate`.

    Attributes:
        real, train: labelled images, as `engine.data.images.open_images` takes them: real ones, and those that the
            diffusion model was trained on.
        reference: name of a request with whose samples the others are compared.
        clip: address of the CLIP model for embeddings; the job's by default.
        features: `auto`, `clip`, `inception`, or the address of an image encoder.
        inception: file or folder of the Inception network.
        failures: whether failures that the rule of acceptance rejected are clustered, too: `accepted` or `all`.
        limit: images of each request that are read.
    """

    real: str | None = None
    train: str | None = None
    reference: str | None = None
    clip: str | None = None
    features: str = "auto"
    inception: str | None = None
    failures: str = "accepted"
    limit: int = DEFAULT_LIMIT
    seed: int = 0

    def check(self) -> None:
        """Check the values.

        Raises:
            JobError: all problems, a line each.
        """
        problems = []
        if not MIN_IMAGES <= self.limit <= MAX_LIMIT:
            problems.append(f"--limit: {self.limit} is not between {MIN_IMAGES} and {MAX_LIMIT:,}")
        if self.inception is not None and self.features not in ("auto", "inception"):
            problems.append(f"--inception: is for Inception's features; leave it or `--features {self.features}` out")
        if problems:
            raise JobError(problems)
