"""The models of a job, and samples made by them: sampling with guidance, decoding, quantising, scoring, encoding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.data.images import encoding as imaging
from engine.errors import JobError
from engine.generation.batches import BatchLoop
from engine.generation.batching import Batches, BatchSizes, useful_size
from engine.generation.conditioner import Conditioner, open_conditioner
from engine.generation.criterion_images import CriterionImages
from engine.generation.decoder_precision import TRIAL_SAMPLES, DecoderPrecisions, Subject
from engine.generation.faults import is_fault_of_machine, is_of_size, may_pass
from engine.generation.given_images import Reader, read_for
from engine.generation.guidance import RequestGuides
from engine.generation.isolation import Isolation
from engine.generation.loading import PipelinePool, load_scorer
from engine.generation.notices import Notices
from engine.generation.results import ImageBatch, SampledImages
from engine.generation.row_shapes import RowShapes, fewest_rows, gpu_multiple
from engine.generation.starts import Size, StartImage, StartImages, StartSets
from engine.job.plan import Plan, RequestPlan, SampleSpec, make_prompt, planned_temperature, planned_validity
from engine.job.records import SampleResult
from engine.job.spec import JobSpec
from engine.methods.conditioning.screening import ScreenedDraw
from engine.methods.guidance.comparison import ComparedDenoiser, in_8_bits
from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.guidance.rules import GradientHealth
from engine.methods.guidance.scene import Decoding
from engine.methods.heartbeat import beat
from engine.methods.parameters import Ensemble
from engine.methods.sampling.denoiser import ClassifierFreeDenoiser
from engine.methods.sampling.loop import Start, sample
from engine.methods.sampling.schedulers import Sampler
from engine.models.decoder import GuidanceDecoder
from engine.models.decoding import Decoder
from engine.models.hardware import choose_hardware
from engine.models.kernels import fix_kernels
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
        fix_kernels(self._hardware)
        device = self._hardware.device
        temperature, validity = planned_temperature(plan.identity), planned_validity(plan.identity)
        self._scorer = load_scorer(job, device, temperature, validity)
        self._target = self._scorer.target
        self._pipelines = PipelinePool(self._hardware, job.models)
        self._conditioners: dict[int, Conditioner] = {}
        self._start_sets = StartSets(plan)
        self._starts: dict[int, StartImages] = {}
        self._guides = RequestGuides(job, plan, self._scorer, device)
        self._criterion_images = CriterionImages(job, plan, self._scorer.clip, device)
        decoder = job.models.guidance_decoder
        self._guidance_decoder = GuidanceDecoder.load(decoder, self._hardware) if decoder else None
        self._precisions = DecoderPrecisions(self._hardware, self.notices)
        self._shapes = RowShapes()
        self._prepared: set[int] = set()
        self._begin_batches()
        if len({self._address(request.number) for request in plan.requests}) == 1:
            for request in plan.requests:
                self.prepare(request.number)

    def _begin_batches(self) -> None:
        """As before the first batch: sizes are to be found, and nothing is proven."""
        self._sizes = BatchSizes(self._job, self._plan, self._hardware, self._kernels)
        requests = self._plan.requests
        self._isolation = Isolation([one.spec.name for one in requests], [one.where for one in requests])
        self._loop = BatchLoop(
            self._sizes,
            self._isolation,
            self.notices,
            self._hardware,
            rows=lambda request: self._model(request).rows,
            sample=self._sampled,
            uncompiled=lambda request: self._model(request).uncompiled(),
        )

    @property
    def device_name(self) -> str:
        """The device in words."""
        if self._hardware.is_cuda:
            return torch.cuda.get_device_name()
        return f"CPU, {torch.get_num_threads()} thread(s)"

    def batches(self, request: int, specs: Sequence[SampleSpec]) -> Batches:
        """The batches of samples of a request, in their order; one is scored after the next one was sampled.

        A batch that fails is made in parts: memory that runs out, or another fault of its size, makes later batches
        smaller. An exception of one sample makes that sample `failed`, not its neighbours.

        Raises:
            EverySampleFailedError: this is the first batch of the request, and every sample of it raised.
            JobError: what the job asks for is impossible.
        """
        self._prepare_first(request)
        with contextlib.closing(self._loop.batches(request, specs)) as batches:
            yield from batches

    def next_batch(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """Results of the first samples of `specs`, as many as fit a batch; see `batches`."""
        self._prepare_first(request)
        num_samples = self._loop.cut(request, len(specs)).num_samples
        [batch] = self.batches(request, specs[:num_samples])
        return batch.results

    def _prepare_first(self, request: int) -> None:
        """As `prepare`; an exception there would be raised by every sample."""
        try:
            self.prepare(request)
        except Exception as error:
            if is_fault_of_machine(error) or is_of_size(error) or may_pass(error):
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
        self._open_images(plan)
        _, height, width = self._model(request).latent_shape
        self._sizes.of(request).bound(useful_size(height * width))
        given = self._criterion_images.of(plan)
        self._guides.prepare(plan, self._model(request).image_shape, self._decoding(request), given)
        # At strength 0 there is no step to be guided.
        if plan.spec.method_record.is_guided and (plan.spec.start is None or plan.spec.start.strength > 0):
            decoder, shape = self._decoder(request), self._model(request).latent_shape
            trial = partial(self._compared, request)
            self._precisions.decide(plan.where, self._subject(request), decoder, shape, trial)
        self._prepared.add(request)

    def _open_images(self, plan: RequestPlan) -> None:
        """What samples of a request are conditioned on, start from and see; images that are several are read once."""
        readers: list[Reader] = []
        self._criterion_images.read(plan, readers.append)
        if plan.spec.conditioning is not None:
            self._conditioners[plan.number] = self._conditioner(plan, readers.append)
        size = Size(*self._model(plan.number).image_shape[1:])
        if (starts := self._start_sets.of(plan, size, readers.append)) is not None:
            self._starts[plan.number] = starts
        read_for(readers, self._target.labels)

    def batch_limit(self, request: int) -> int:
        """Largest batch of a request, since one failed here or memory ran out elsewhere; 0 where nothing limits it."""
        return self._sizes.of(request).limit

    def limit_batches(self, request: int, limit: int) -> None:
        """Make no batches of a request larger than this for now: memory ran out on a machine of the same kind."""
        self._sizes.limit(request, limit)

    def _sampled(self, request: int, specs: Sequence[SampleSpec], num_rows: int) -> ImageBatch:
        """The images of samples; the last of them fills the batch up to its rows.

        On a CPU bytes must not depend on the neighbours, and compiled kernels are made for one shape.
        """
        missing = num_rows - len(specs)
        padded, draws = [*specs, *[specs[-1]] * missing], self._draws(request, specs)
        draws += draws[-1:] * missing
        starts = self._start_images(request, padded)
        start = self._start(request, starts)
        images, health = self.sample(request, padded, draws, start, len(specs))
        has_twin = self._job.requests[request].twin
        twins = self.sample(request, padded, draws, start, len(specs), is_guided=False)[0] if has_twin else None
        sampled = SampledImages(
            specs=padded,
            num_samples=len(specs),
            pixels=imaging.quantise(images),
            is_finite=_finite_rows(images),
            health=health,
            draws=draws,
            starts=starts,
            twins=None if twins is None else imaging.quantise(twins),
            is_twin_finite=() if twins is None else _finite_rows(twins),
        )
        checker = self._model(request).safety_checker
        return ImageBatch(sampled, self._job, self._plan, request, self._scorer, checker, self.notices)

    def _draws(self, request: int, specs: Sequence[SampleSpec]) -> list[ScreenedDraw]:
        """The image embedding that conditions each sample; empty where none does."""
        conditioner, draws = self._conditioners.get(request), list[ScreenedDraw]()
        if conditioner is None:
            return draws
        for spec in specs:
            draws.append(conditioner.draw(spec))
            beat()
        return draws

    def _start_images(self, request: int, specs: Sequence[SampleSpec]) -> list[StartImage]:
        """The image that each sample starts from; empty where they start from noise alone."""
        starts = self._starts.get(request)
        return [] if starts is None else [starts.of(spec) for spec in specs]

    def sample(
        self,
        request: int,
        specs: Sequence[SampleSpec],
        draws: Sequence[ScreenedDraw],
        start: Start | None = None,
        num_samples: int | None = None,
        *,
        is_guided: bool = True,
    ) -> tuple[Tensor, GradientHealth]:
        """Images [B, 3, H, W], nominally in [0, 1], of samples of a request, and the health of their gradients.

        Args:
            draws: the image embeddings of a request with `conditioning`, one a sample; empty for others.
            start: of a request with `start`; None for others.
            num_samples: how many of `specs` are samples, the others repeating the last of them; None for all.
            is_guided: whether by the request's method; else the samples are unguided twins.
        """
        num_samples = num_samples or len(specs)
        rows, multiple = self._rows(request, specs, draws, num_samples)
        denoiser, sampler, noise = self._denoiser(request, specs[:rows], draws[:rows])
        guided = self._guided(request, specs[:rows], denoiser, multiple) if is_guided else None
        latents = sample(guided or denoiser, sampler, noise, start and start.first(rows))
        health = guided.health.on_host() if guided else GradientHealth.of(rows)
        if rows < len(specs):
            places = torch.arange(len(specs)).clamp_max(num_samples - 1)
            latents, health = latents[places], health.rows(places)
        with torch.no_grad():
            return self._model(request).decode(latents), health

    def _rows(
        self, request: int, specs: Sequence[SampleSpec], draws: Sequence[ScreenedDraw], num_samples: int
    ) -> tuple[int, int | None]:
        """Rows that samples are denoised in, and the multiple of rows that gradients may be taken for.

        Args:
            specs: filled up to the rows that score.
        """
        model, spec = self._model(request), self._job.requests[request]
        if spec.method_record.has_criterion:
            # What it computes for a row is not known to depend on that row alone.
            return len(specs), None
        parameters, hardware = self._job.parameters_of(spec), self._hardware
        if not hardware.is_cpu:
            is_free = parameters.can_arrive and not (hardware.deterministic or hardware.compile)
            return len(specs), gpu_multiple(len(specs)) if is_free else None
        rows = fewest_rows(num_samples, len(specs))
        if not model.takes_fewer_rows or len(specs) != model.rows or rows == len(specs):
            return len(specs), None
        sampling = self._job.sampling_of(spec)
        # Of few steps the first guided one may be the last, whose gradient does not go through the UNet.
        steps = sampling.num_inference_steps if spec.method_record.is_guided else 0
        kernels = (self._address(request), model.latent_shape, sampling.guidance_scale > 1)
        key = (*kernels, spec.method, parameters.model_dump_json(), steps)
        if not self._shapes.agree(key, partial(self._computed, request, specs, draws), len(specs)):
            return len(specs), None
        # Sixteen rows are too few for gradients of some of them to save time.
        return rows, None

    def _computed(
        self, request: int, specs: Sequence[SampleSpec], draws: Sequence[ScreenedDraw], num_rows: int
    ) -> list[Tensor] | None:
        """Tensors [num_rows, ...] of a step of the first samples: predictions, criteria, gradients, the moved latents.

        None where a criterion has no gradient, which would show nothing of what it measures.
        """
        denoiser, sampler, noise = self._denoiser(request, specs[:num_rows], draws[:num_rows])
        # The worst of several targets would show the kernels of one of them.
        guided = self._guided(request, specs[:num_rows], denoiser, ensemble="mean")
        steps = [step for step in sampler.steps() if guided is None or guided.guides(step)]
        if not steps:
            return None
        step = steps[0]
        latents = noise * math.hypot(step.scale, step.sigma)
        plain = denoiser(latents, step)
        beat()
        if guided is None:
            return [plain.output]
        prediction = guided.predict(latents, step)
        losses, gradients = guided.gradients(prediction, step)
        beat()
        moved = guided.moved(losses, gradients, prediction, step)
        # With a graph the halves of a prediction are calls of their own: they get the same bytes, too.
        is_one = torch.equal(plain.conditional, prediction.conditional)
        tensors = [plain.output, losses.T, gradients.transpose(0, 1), moved.output, moved.latents]
        return tensors if is_one and gradients.flatten(1).any(1).all() else None

    def _denoiser(
        self, request: int, specs: Sequence[SampleSpec], draws: Sequence[ScreenedDraw]
    ) -> tuple[ClassifierFreeDenoiser, Sampler, Tensor]:
        """What samples without guidance, and the noise [B, C, h, w] to start from."""
        model, sampling = self._model(request), self._job.sampling_of(self._job.requests[request])
        stream = model.noise_stream([spec.seed for spec in specs])
        drawn, sampler = model.first_noise(stream), model.sampler(sampling, stream)
        images = self._image_conditioning(request, draws, drawn)
        denoiser = model.denoiser([spec.prompt for spec in specs], sampling, sampler, images)
        return denoiser, sampler, drawn[LATENTS]

    def _start(self, request: int, images: Sequence[StartImage]) -> Start | None:
        """Where the samples of a request start in place of noise alone; `images` are of the whole batch."""
        spec = self._job.requests[request].used_start
        if spec is None:
            return None
        pixels = torch.from_numpy(np.stack([image.pixels for image in images])).to(self._hardware.device)
        with torch.no_grad():
            latents = self._model(request).encode_images(pixels.permute(0, 3, 1, 2).float() / 255)
        return Start(latents=latents.float(), strength=spec.strength)

    def _guided(
        self,
        request: int,
        specs: Sequence[SampleSpec],
        denoiser: ClassifierFreeDenoiser,
        row_multiple: int | None = None,
        ensemble: Ensemble | None = None,
    ) -> GuidedDenoiser | None:
        classes = [spec.cell.classes for spec in specs]
        return self._guides.guided(request, denoiser, classes, self._decoding(request), row_multiple, ensemble)

    def _compared(self, request: int, decoding: Decoding) -> Tensor:
        """Cosines [2, n] of gradients with another decoding, and with images in 8 bits, to those of a request.

        They are of its first samples; see `ComparedDenoiser`.
        """
        plan = self._plan.requests[request]
        specs = [plan.sample(position) for position in range(min(TRIAL_SAMPLES, plan.limit))]
        denoiser, sampler, noise = self._denoiser(request, specs, self._draws(request, specs))
        guided = self._guided(request, specs, denoiser)
        assert guided is not None
        compared = ComparedDenoiser(guided, [decoding, in_8_bits(self._decoding(request))])
        with self._model(request).uncompiled():
            sample(compared, sampler, noise, self._start(request, self._start_images(request, specs)))
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

    def _kernels(self, request: int) -> str:
        """What the shapes of a request's model calls depend on, but for the rows: its pipeline and its images' size."""
        sampling = self._job.sampling_of(self._job.requests[request])
        return f"{self._address(request)} {sampling.height} x {sampling.width}"

    def _model(self, request: int) -> Pipeline:
        return self._pipelines.get(self._address(request), self._job.sampling_of(self._job.requests[request]))

    def _conditioner(self, request: RequestPlan, later: Callable[[Reader], None]) -> Conditioner:
        spec = request.spec.conditioning
        assert spec is not None
        for number in self._prepared:
            other = self._plan.requests[number]
            is_same = (other.spec.conditioning, other.cells, other.limit) == (spec, request.cells, request.limit)
            if is_same and self._address(number) == self._address(request.number):
                return self._conditioners[number]
        planned = self._plan.identity["requests"][request.number]["conditioning"]
        digest = planned["images" if spec.artefact is None else "artefact"]
        address = self._address(request.number)
        return open_conditioner(request, address, self._target.labels, self._hardware.device, digest, later)

    def _check_combination(self, request: int) -> None:
        """Whether pipeline, sampling and conditioning go together; a pipeline of the hub was not there to be checked.

        Raises:
            JobError: they do not.
        """
        model, spec = self._model(request), self._job.requests[request]
        where = self._plan.requests[request].where
        try:
            model.sampler(self._job.sampling_of(spec))
        except ValueError as error:
            raise JobError(f"{where}: {error}") from None
        problems = [f".sampling{problem}" for problem in model.size_problems(model.folder, self._job.sampling_of(spec))]
        conditioning = model.conditioning_problems(model.folder, self._address(request), spec.conditioning)
        problems += [f".conditioning{problem}" for problem in conditioning]
        if problems:
            raise JobError([f"{where}{problem}" for problem in problems])


def _finite_rows(images: Tensor) -> list[bool]:
    """Of each image [B, C, H, W], whether all values are finite."""
    return torch.isfinite(images).flatten(1).all(1).tolist()


def longest_prompts(request: RequestPlan) -> list[str]:
    """The prompts of a request with its longest class name, one a context: the likeliest to be too long."""
    cell = max(request.cells, key=lambda cell: len(" ".join(cell.names)))
    return [make_prompt(request.spec.prompt, cell, context) for context in request.spec.contexts]
