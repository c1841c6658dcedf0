"""Samples of a request, batch by batch: sampling with guidance, decoding, quantising, scoring, encoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from engine.data.images import encoding as imaging
from engine.errors import JobError
from engine.generation.batching import BatchSize, Peak
from engine.generation.conditioner import Conditioner, open_conditioner
from engine.generation.decoder_precision import TRIAL_SAMPLES, DecoderPrecisions, Subject
from engine.generation.guidance import RequestGuides
from engine.generation.isolation import Isolation, failed_result, is_fault_of_machine, may_pass
from engine.generation.loading import PipelinePool, load_scorer, reachable_memory
from engine.generation.notices import Notices
from engine.job.acceptance import is_accepted
from engine.job.plan import Plan, RequestPlan, SampleSpec, make_prompt
from engine.job.records import STATUS_FAILED, STATUS_OK, STATUS_REJECTED, SampleResult, check_record
from engine.job.spec import JobSpec
from engine.methods.conditioning.screening import ScreenedDraw
from engine.methods.guidance.comparison import ComparedDenoiser
from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.guidance.rules import GradientHealth
from engine.methods.guidance.scene import Decoding
from engine.methods.heartbeat import beat
from engine.methods.sampling.denoiser import ClassifierFreeDenoiser
from engine.methods.sampling.loop import sample
from engine.methods.sampling.schedulers import Sampler
from engine.models.decoder import GuidanceDecoder
from engine.models.decoding import Decoder
from engine.models.hardware import choose_hardware, fix_kernels
from engine.models.pipelines.base import LATENTS, ImageConditioning, Pipeline


class Generator:
    """Holds the models of a job and turns sample specs into results.

    Attributes:
        notices: what the hardware made it do otherwise than the job says.

    Raises:
        JobError: a model cannot be loaded or the hardware lacks what `runtime` asks for.
    """

    def __init__(self, job: JobSpec, plan: Plan) -> None:
        self._job = job
        self._plan = plan
        self.notices = Notices()
        self._hardware = choose_hardware(job.runtime)
        if self._hardware.is_cuda and self._hardware.deterministic:
            fix_kernels()
        device = self._hardware.device
        self._scorer = load_scorer(job, device)
        self._target = self._scorer.target
        self._pipelines = PipelinePool(self._hardware, checks_safety=job.models.safety_checker == "auto")
        self._conditioners: dict[int, Conditioner] = {}
        self._guides = RequestGuides(job, plan, self._scorer, device)
        decoder = job.models.guidance_decoder
        self._guidance_decoder = GuidanceDecoder.load(decoder, self._hardware) if decoder else None
        self._precisions = DecoderPrecisions(self._hardware, self.notices)
        wanted = job.runtime.batch_size
        # Requests differ in what a sample of theirs takes: each finds its own size.
        self._batches = [BatchSize() if wanted == "auto" else BatchSize(wanted, grows=False) for _ in plan.requests]
        self._prepared: set[int] = set()
        self._isolation = Isolation([request.spec.name for request in plan.requests])
        if len({self._address(request.number) for request in plan.requests}) == 1:
            for request in plan.requests:
                self.prepare(request.number)

    @property
    def device_name(self) -> str:
        """The device in words."""
        if self._hardware.is_cuda:
            return torch.cuda.get_device_name()
        return f"CPU, {torch.get_num_threads()} thread(s)"

    def next_batch(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """Results of the first samples of `specs`, as many as fit a batch.

        Out of memory halves the batch. An exception of one sample makes that sample `failed`, not its neighbours.

        Raises:
            EverySampleFailedError: this is the first batch of the request, and every sample of it raised.
            JobError: what the job asks for is impossible.
        """
        self._prepare_first(request)
        while True:
            rows = self._rows(request)
            batch = specs[: rows or self._batches[request].size]
            results = self._within_memory(request, batch)
            if results is not None:
                return results
            # Only here the tensors of the failed batch are released.
            torch.cuda.empty_cache()
            used = rows or len(batch)
            if used == 1:
                raise JobError(
                    "runtime: a single sample does not fit the GPU's memory; use precision fp16, gradient_checkpointing"
                    " on, or fewer models"
                )
            if self._hardware.deterministic:
                raise JobError(
                    f"runtime.batch_size: {used} samples do not fit the GPU's memory, and with deterministic the size"
                    f" decides bytes; give a smaller one for the whole run, such as {used // 2}"
                )
            self._batches[request].halve(used)

    def _prepare_first(self, request: int) -> None:
        """As `prepare`; an exception there would be raised by every sample."""
        try:
            self.prepare(request)
        except Exception as error:
            if is_fault_of_machine(error) or may_pass(error):
                raise
            raise self._isolation.every_sample_failed(request, error) from error

    def prepare(self, request: int) -> None:
        """Load what a request needs and check that it fits together, once; at the latest when it is needed.

        Raises:
            JobError: a model cannot be loaded, or does not support what is asked for.
        """
        if request in self._prepared:
            return
        plan = self._plan.requests[request]
        self._check_combination(request)
        negative = self._job.sampling_of(plan.spec).negative_prompt
        self._model(request).check_prompts([*longest_prompts(plan), negative])
        if plan.spec.conditioning is not None:
            self._conditioners[request] = self._conditioner(plan)
        self._guides.prepare(plan, self._model(request).image_shape, self._decoding(request))
        if plan.spec.method_record.is_guided:
            decoder, shape = self._decoder(request), self._model(request).latent_shape
            trial = partial(self._compared, request)
            self._precisions.decide(f"requests.{request}", self._subject(request), decoder, shape, trial)
        self._prepared.add(request)

    def batch_limit(self, request: int) -> int:
        """Largest batch of a request, since memory has run out; 0 where it never has."""
        return self._batches[request].limit

    def limit_batches(self, request: int, limit: int) -> None:
        """Make no batches of a request larger than this: memory has run out on a machine of the same kind."""
        self._batches[request].cap(limit)

    def _within_memory(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult] | None:
        """Results of a batch, or None where the GPU's memory does not hold it."""
        if self._hardware.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            results = self._isolation.results(request, specs, partial(self._results, request))
        except torch.OutOfMemoryError:
            return None
        if self._hardware.is_cuda:
            self._batches[request].observe(Peak(len(specs), torch.cuda.max_memory_allocated()), reachable_memory())
        return results

    def _rows(self, request: int) -> int | None:
        """Samples that every batch is filled up to, where its shape is fixed."""
        fixed = self._batches[request].size if self._hardware.has_fixed_shape else None
        return self._model(request).rows or fixed

    def _results(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """Sample, decode, score and encode a batch; an exception is of the whole batch."""
        rows = self._rows(request)
        # The last sample fills up a batch of fixed shape: on a CPU bytes must not depend on the neighbours.
        missing = (rows or len(specs)) - len(specs)
        padded, draws = [*specs, *[specs[-1]] * missing], self._draws(request, specs)
        draws += draws[-1:] * missing
        images, health = self.sample(request, padded, draws)
        faults = self._faults(request, images)
        pixels = imaging.quantise(images)
        output = self._job.output
        files, shown = imaging.stored(pixels, output.image_format, provenance=output.provenance)
        records = self._scorer.records(padded, shown)
        return [
            failed_result(spec, faults[row] or record["error_message"])
            if faults[row] or record["status"] == STATUS_FAILED
            else self._result(
                request, spec, record | _counts(health, row), files[row], len(padded), draws[row] if draws else None
            )
            for row, (spec, record) in enumerate(zip(specs, records[: len(specs)], strict=True))
        ]

    def _faults(self, request: int, images: Tensor) -> list[str]:
        """Why each of the images [B, 3, H, W] must not be stored; empty for the others."""
        finite = torch.isfinite(images).flatten(1).all(1).tolist()
        checker = self._model(request).safety_checker
        shown = [PIL.Image.fromarray(pixels) for pixels in imaging.quantise(images)] if checker else []
        unsafe = checker.faults(shown) if checker else [""] * len(images)
        return [
            text if is_finite else "the sampler produced values that are not finite"
            for is_finite, text in zip(finite, unsafe, strict=True)
        ]

    def _draws(self, request: int, specs: Sequence[SampleSpec]) -> list[ScreenedDraw]:
        """The image embedding that conditions each sample; empty where none does."""
        conditioner, draws = self._conditioners.get(request), list[ScreenedDraw]()
        if conditioner is None:
            return draws
        for spec in specs:
            draws.append(conditioner.draw(spec))
            beat()
        return draws

    def _result(
        self,
        request: int,
        spec: SampleSpec,
        record: dict[str, Any],
        image: Callable[[], bytes],
        batch_size: int,
        draw: ScreenedDraw | None,
    ) -> SampleResult:
        """A scored sample, accepted or rejected by the request's rule."""
        record["screened"] = draw is not None and draw.screened
        try:
            check_record(record)
        except ValueError as error:
            return failed_result(spec, str(error))
        rule, version = self._job.requests[request].accept, self._plan.schema_version
        accepted = is_accepted(rule, record, spec.cell.classes, version)
        stored = accepted or self._job.output.store_rejected
        return SampleResult(
            record=record | {"accepted": accepted, "status": STATUS_OK if accepted else STATUS_REJECTED},
            image=image if stored else b"",
            run={"batch_size": batch_size},
            num_draws=draw.num_draws if draw else 0,
        )

    def sample(
        self, request: int, specs: Sequence[SampleSpec], draws: Sequence[ScreenedDraw]
    ) -> tuple[Tensor, GradientHealth]:
        """Images [B, 3, H, W], nominally in [0, 1], of samples of a request, and the health of their gradients.

        Args:
            draws: the image embeddings of a request with `conditioning`, one a sample; empty for others.
        """
        denoiser, sampler, noise = self._denoiser(request, specs, draws)
        guided = self._guided(request, specs, denoiser)
        latents = sample(guided or denoiser, sampler, noise)
        health = guided.health if guided else GradientHealth.of(len(specs))
        with torch.no_grad():
            return self._model(request).decode(latents), health

    def _denoiser(
        self, request: int, specs: Sequence[SampleSpec], draws: Sequence[ScreenedDraw]
    ) -> tuple[ClassifierFreeDenoiser, Sampler, Tensor]:
        """What samples without guidance, and the noise [B, C, h, w] to start from."""
        model, sampling = self._model(request), self._job.sampling_of(self._job.requests[request])
        sampler = model.sampler(sampling)
        drawn = model.draw_noise([spec.seed for spec in specs])
        images = self._image_conditioning(request, draws, drawn)
        denoiser = model.denoiser([spec.prompt for spec in specs], sampling, sampler, images)
        return denoiser, sampler, drawn[LATENTS]

    def _guided(
        self, request: int, specs: Sequence[SampleSpec], denoiser: ClassifierFreeDenoiser
    ) -> GuidedDenoiser | None:
        classes = [spec.cell.classes for spec in specs]
        return self._guides.guided(request, denoiser, classes, self._decoding(request))

    def _compared(self, request: int, decoding: Decoding) -> Tensor:
        """Cosines [n] of gradients with another decoding to those of the first samples of a request; see `cosines`."""
        plan = self._plan.requests[request]
        specs = [plan.sample(position) for position in range(min(TRIAL_SAMPLES, plan.limit))]
        denoiser, sampler, noise = self._denoiser(request, specs, self._draws(request, specs))
        guided = self._guided(request, specs, denoiser)
        assert guided is not None
        compared = ComparedDenoiser(guided, decoding)
        # Compiling for the rows of a trial would take longer than the trial.
        eager = torch.compiler.set_stance("force_eager") if self._hardware.compile else contextlib.nullcontext()
        with eager:
            sample(compared, sampler, noise)
        return compared.cosines()

    def _image_conditioning(
        self, request: int, draws: Sequence[ScreenedDraw], noise: Mapping[str, Tensor]
    ) -> ImageConditioning | None:
        conditioning = self._job.requests[request].conditioning
        if conditioning is None:
            return None
        embeds = torch.stack([draw.embedding for draw in draws]).to(self._hardware.device)
        return ImageConditioning(embeds=embeds, noise=noise, noise_level=conditioning.noise_level)

    def _decoding(self, request: int) -> Decoding:
        """How guidance decodes latents [B, C, H, W] to images [B, 3, H, W] that it differentiates."""
        precision = self._precisions.of(self._subject(request))
        return self._decoder(request).decoding(self._model(request).latent_shape, precision)

    def _decoder(self, request: int) -> Decoder:
        return self._guidance_decoder or self._model(request).decoder

    def _subject(self, request: int) -> Subject:
        spec = self._job.requests[request]
        return Subject(self._address(request), self._job.models.guidance_decoder or "", spec.method)

    def _address(self, request: int) -> str:
        return self._job.requests[request].diffusion or self._job.models.diffusion

    def _model(self, request: int) -> Pipeline:
        return self._pipelines.get(self._address(request))

    def _conditioner(self, request: RequestPlan) -> Conditioner:
        spec = request.spec.conditioning
        assert spec is not None
        planned = self._plan.identity["requests"][request.number]["conditioning"]
        digest = planned["images" if spec.artefact is None else "artefact"]
        address = self._address(request.number)
        return open_conditioner(request, address, self._target.labels, self._hardware.device, digest)

    def _check_combination(self, request: int) -> None:
        """Whether pipeline, sampling and conditioning go together; a pipeline of the hub was not there to be checked.

        Raises:
            JobError: they do not.
        """
        model, spec = self._model(request), self._job.requests[request]
        try:
            model.sampler(self._job.sampling_of(spec))
        except ValueError as error:
            raise JobError(f"requests.{request}: {error}") from None
        problems = model.conditioning_problems(model.folder, self._address(request), spec.conditioning)
        if problems:
            raise JobError([f"requests.{request}.conditioning{problem}" for problem in problems])


def longest_prompts(request: RequestPlan) -> list[str]:
    """The prompts of a request with its longest class name, one a context: the likeliest to be too long."""
    cell = max(request.cells, key=lambda cell: len(" ".join(cell.names)))
    return [make_prompt(request.spec.prompt, cell, context) for context in request.spec.contexts]


def _counts(health: GradientHealth, row: int) -> dict[str, Any]:
    return {
        "guided_steps": int(health.guided_steps[row]),
        "zero_gradients": int(health.zero[row]),
        "nonfinite_gradients": int(health.nonfinite[row]),
    }
