"""The models of a job, loaded for one worker."""

from __future__ import annotations

import gc

import torch

from engine.errors import JobError
from engine.generation.oracle_scoring import Oracles
from engine.generation.scorer import Scorer
from engine.job.spec import JobSpec, ModelsSpec
from engine.methods.sampling.spec import SamplingSpec
from engine.methods.validity import ValidityModel
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.diffusion import load_pipeline
from engine.models.gpu_sharing import allowed_bytes, reachable_bytes
from engine.models.hardware import Hardware
from engine.models.pipelines.base import Pipeline
from engine.models.relabelled import load_classifier_for, load_oracle_for

OWN_SIZE = SamplingSpec()


class PipelinePool:
    """Diffusion pipelines by address, each loaded when it is first asked for.

    A GPU holds one at a time: shards are dispatched to workers that hold theirs.
    """

    def __init__(self, hardware: Hardware, models: ModelsSpec) -> None:
        self._hardware = hardware
        self._models = models
        self._pipelines: dict[str, Pipeline] = {}
        self._sized: dict[tuple[str, int | None, int | None], Pipeline] = {}

    def get(self, address: str, sampling: SamplingSpec = OWN_SIZE) -> Pipeline:
        """The pipeline of an address, in the size of a request's images.

        Raises:
            JobError: it cannot be loaded.
        """
        if address not in self._pipelines:
            if self._hardware.is_cuda:
                self._pipelines.clear()
                self._sized.clear()
                # Decoders, and parts of the libraries, are in cycles: the next pipeline would be loaded next to them.
                gc.collect()
                torch.cuda.empty_cache()
            checks_safety = self._models.safety_checker == "auto"
            self._pipelines[address] = load_pipeline(
                address, self._hardware, checks_safety=checks_safety, models=self._models
            )
            self._pipelines[address].make_steady()
        key = (address, sampling.height, sampling.width)
        if key not in self._sized:
            self._sized[key] = self._pipelines[address].in_size(sampling)
        return self._sized[key]


def load_target(job: JobSpec, temperature: float | None, device: str = "cpu") -> Classifier:
    """The target of a job as its run has it.

    Args:
        temperature: in place of the target's own (`engine.models.calibration`); None for its own.

    Raises:
        JobError: it cannot be loaded.
    """
    return Classifier.load(job.models.target, device, temperature)


def load_scorer(
    job: JobSpec, device: str = "cpu", temperature: float | None = None, validity: ValidityModel | None = None
) -> Scorer:
    """The models of a job that score and never sample.

    Args:
        temperature: of the target, as in `load_target`.
        validity: the estimate of the share of people who agree, as the plan has it; None without one.

    Raises:
        JobError: one cannot be loaded.
    """
    target, maps = load_target(job, temperature, device), job.models.label_map
    return Scorer(
        target,
        Clip.load(job.models.clip, device),
        [load_classifier_for(address, device, target.labels, maps) for address in job.models.transfer],
        Oracles(
            [load_oracle_for(address, device, target.labels, maps) for address in job.models.all_oracles],
            is_guiding=job.oracle_guides,
            validity=validity,
        ),
        Clip.load(job.models.judge, device) if job.models.judge else None,
        [load_classifier_for(address, device, target.labels, maps) for address in job.models.further_targets],
    )


def reachable_memory(share: float = 1.0) -> int:
    """Bytes of the GPU that this process holds already or could still get.

    Args:
        share: part of the GPU that is this worker's; see `reachable_bytes`.
    """
    free, total = torch.cuda.mem_get_info()
    return reachable_bytes(free, torch.cuda.memory_reserved(), total, share)


def limit_memory(share: float) -> None:
    """Let torch's allocator hold no more of the GPU than a worker's share of it.

    Raises:
        JobError: nothing would be left for models.

    Side effects: starts CUDA, and sets the allocator's limit for this process.
    """
    _, total = torch.cuda.mem_get_info()
    allowed = allowed_bytes(total, share)
    if not allowed:
        raise JobError(
            f"runtime.workers: {round(1 / share)} on a GPU of {total / 2**30:.0f} GiB leave none of them memory for"
            " its models; use fewer"
        )
    torch.cuda.set_per_process_memory_fraction(allowed / total)
