"""A worker without models, which tells what its executor gave it. Light to import: every actor does."""

from __future__ import annotations

import os
from typing import Any

from engine.models.gpu_sharing import gpu_share


class Witness:
    """A worker whose shards end with its share of a GPU, by Ray and by its executor, and what its process sees."""

    def __init__(self) -> None:
        self._share = gpu_share()

    def sample_shard(self, *_: Any) -> Any:
        """The outcome."""
        import ray

        assigned = ray.get_runtime_context().get_assigned_resources()
        outcome = {
            "assigned": assigned.get("GPU", 0.0),
            "share": self._share,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "threads": os.environ["OMP_NUM_THREADS"],
        }
        return lambda: outcome
