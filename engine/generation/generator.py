"""Samples of a request, batch by batch: sampling with guidance, decoding, quantising, scoring, encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from engine.data.images import encoding as imaging
from engine.errors import EverySampleFailedError, JobError, RiskforgeError, first_line
from engine.generation.batching import BatchSize, Peak
from engine.generation.conditioner import Conditioner, open_conditioner
from engine.generation.scorer import Scorer
from engine.job.acceptance import is_accepted
from engine.job.plan import Plan, RequestPlan, SampleSpec, make_prompt
from engine.job.records import STATUS_FAILED, STATUS_OK, STATUS_REJECTED, SampleResult, check_record, failed_record
from engine.job.spec import MAX_SEED, JobSpec
from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.conditioning.screening import ScreenedDraw
from engine.methods.custom.guide import NO_CHANCE, Criterion, Scene, criterion_problem, guide_by, same_values
from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.rules import GradientHealth
from engine.methods.heartbeat import beat
from engine.methods.risky.guide import guide_to_risk
from engine.methods.sampling.loop import sample
from engine.methods.sampling.noise import draw_noise
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.custom_methods import load_method, method_digest
from engine.models.decoder import GuidanceDecoder
from engine.models.diffusion import Diffusion
from engine.models.factories import reason_of
from engine.models.hardware import choose_hardware, fix_kernels
from engine.models.randomness import watched
from engine.terminal import redacted

# What torch says of an operator that `deterministic` forbids.
_NOT_DETERMINISTIC = "does not have a deterministic implementation"
# Older device and allocator errors are plain RuntimeErrors.
_MACHINE_SIGNS = (
    "CUDA error", "HIP error", "cuDNN error", "CUBLAS_STATUS", "can't allocate memory", "not enough memory",
    "out of memory",
)  # fmt: skip
# Of errors of the operating system, those that come again: the others may pass.
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# In the names of what libraries raise about networks.
_NETWORK_SIGNS = ("Timeout", "Connect", "Network", "Transport", "Protocol")


class Generator:
    """Holds the models of a job and turns sample specs into results.

    Raises:
        JobError: a model cannot be loaded or the hardware lacks what `runtime` asks for.
    """

    def __init__(self, job: JobSpec, plan: Plan) -> None:
        self._job = job
        self._plan = plan
        self._hardware = choose_hardware(job.runtime)
        if self._hardware.is_cuda and self._hardware.deterministic:
            fix_kernels()
        device = self._hardware.device
        self._scorer = load_scorer(job, device)
        self._target = self._scorer.target
        self._diffusion: dict[str, Diffusion] = {}
        self._conditioners: dict[int, Conditioner] = {}
        self._criteria: dict[int, Criterion] = {}
        decoder = job.models.guidance_decoder
        self._guidance_decoder = GuidanceDecoder.load(decoder, self._hardware) if decoder else None
        wanted = job.runtime.batch_size
        # Requests differ in what a sample of theirs takes: each finds its own size.
        self._batches = [BatchSize() if wanted == "auto" else BatchSize(wanted, grows=False) for _ in plan.requests]
        self._prepared: set[int] = set()
        # Requests of which some batch went through, whatever became of its samples.
        self._proven: set[int] = set()
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
            JobError: what the job asks for cannot be.
        """
        self._prepare_first(request)
        while True:
            rows = self._rows(request)
            batch = specs[: rows or self._batches[request].size]
            results = self._within_memory(request, batch)
            if results is not None:
                return results
            # Only here are the tensors of the failed batch let go of.
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
        """As `prepare`; what it stumbles over, every sample would."""
        try:
            self.prepare(request)
        except Exception as error:
            if is_fault_of_machine(error) or may_pass(error):
                raise
            raise self._every_sample_failed(request, error) from error

    def prepare(self, request: int) -> None:
        """Load what a request needs and check that it fits together; once. Done where it is needed, at the latest.

        Raises:
            JobError: the model cannot be loaded or does not do what is asked for.
        """
        if request in self._prepared:
            return
        plan = self._plan.requests[request]
        self._check_combination(request)
        negative = self._job.sampling_of(plan.spec).negative_prompt
        self._model(request).check_prompts([*longest_prompts(plan), negative])
        if plan.spec.conditioning is not None:
            self._conditioners[request] = self._conditioner(plan)
        if plan.spec.is_custom:
            self._criteria[request] = self._criterion(plan)
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
            results = self._isolating(request, specs)
        except torch.OutOfMemoryError:
            return None
        if self._hardware.is_cuda:
            self._batches[request].observe(Peak(len(specs), torch.cuda.max_memory_allocated()), memory_within_reach())
        return results

    def _rows(self, request: int) -> int | None:
        """Samples that every batch is filled up to, where its shape is fixed."""
        fixed = self._batches[request].size if self._hardware.has_fixed_shape else None
        return self._model(request).rows or fixed

    def _isolating(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """Results of a batch; after an exception one by one, to find the sample that it came from.

        What fails with every sample is not a sample's fault.
        """
        outcome = self._outcome(request, specs)
        if not isinstance(outcome, Exception):
            return outcome
        is_first = request not in self._proven
        outcomes: list[list[SampleResult] | Exception] = [outcome]
        if len(specs) > 1:
            outcomes = [_without_frames(self._outcome(request, [spec])) for spec in specs]
        elif is_first:
            # One sample shows nothing of the others: another noise is tried.
            outcomes.append(self._outcome(request, [_with_other_noise(specs[0])]))
        failures = [one for one in outcomes if isinstance(one, Exception)]
        if len(failures) == len(outcomes) > 1:
            if is_first and not any(map(may_pass, failures)):
                raise self._every_sample_failed(request, outcome) from outcome
            raise outcome
        return [
            _failed(spec, _first_line(one)) if isinstance(one, Exception) else one[0]
            for spec, one in zip(specs, outcomes[: len(specs)], strict=True)
        ]

    def _outcome(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult] | Exception:
        """Results of a batch, or what it raised where that may be a sample's fault."""
        try:
            results = self._results(request, specs)
        except SystemExit as error:
            # Of code that the job names: it would end the worker, not the run, again and again.
            return RuntimeError(f"SystemExit: {error.code}").with_traceback(error.__traceback__)
        except Exception as error:
            if _NOT_DETERMINISTIC in str(error):
                operator = str(error).split(_NOT_DETERMINISTIC)[0].strip()
                raise JobError(
                    f"runtime.deterministic: {operator} of these models has no deterministic form on a GPU; switch"
                    " deterministic off, or use models without it"
                ) from error
            if is_fault_of_machine(error):
                raise
            return error
        self._proven.add(request)
        return results

    def _every_sample_failed(self, request: int, error: Exception) -> EverySampleFailedError:
        name = self._job.requests[request].name
        return EverySampleFailedError(
            f"requests.{request}: every sample of the first batch of '{name}' failed: {reason_of(error)}; other"
            " attempts would fail the same way: fix what the job names here, and the same command goes on"
        )

    def _results(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
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
            _failed(spec, faults[row] or record["error_message"])
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
        shown = [PIL.Image.fromarray(one) for one in imaging.quantise(images)] if checker else []
        unsafe = checker.faults(shown) if checker else [""] * len(images)
        return [
            text if is_finite else "the sampler produced values that are not finite"
            for is_finite, text in zip(finite, unsafe, strict=True)
        ]

    def _draws(self, request: int, specs: Sequence[SampleSpec]) -> list[ScreenedDraw]:
        """What conditions each sample beside its prompt; empty where nothing does."""
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
            return _failed(spec, str(error))
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
            draws: what conditions each sample, for a Stable unCLIP pipeline; empty for others.
        """
        model, spec = self._model(request), self._job.requests[request]
        sampling = self._job.sampling_of(spec)
        sampler = model.sampler(sampling)
        noise, class_labels = self._noise(request, specs, draws)
        denoiser = model.denoiser([one.prompt for one in specs], sampling, sampler, class_labels)
        if spec.method == "prompt":
            latents, health = sample(denoiser, sampler, noise), GradientHealth.of(len(specs))
        else:
            guided = self._guided(denoiser, request, specs)
            latents, health = sample(guided, sampler, noise), guided.health
        with torch.no_grad():
            return model.decode(latents), health

    def _noise(
        self, request: int, specs: Sequence[SampleSpec], draws: Sequence[ScreenedDraw]
    ) -> tuple[Tensor, Tensor | None]:
        """First noise of the latents and, for a Stable unCLIP pipeline, the class labels of the embeddings."""
        model, conditioning = self._model(request), self._job.requests[request].conditioning
        seeds, device = [one.seed for one in specs], self._hardware.device
        if model.noiser is None or conditioning is None:
            return draw_noise(seeds, model.latent_shape, device=device)[0], None
        # The pipeline's order: a generator draws the noise of the embedding before that of the latents.
        embed_noise, noise = draw_noise(seeds, (model.noiser.dim,), model.latent_shape, device=device)
        embeds = torch.stack([draw.embedding for draw in draws]).to(device)
        return noise, model.noiser.class_labels(embeds, embed_noise, conditioning.noise_level)

    def _guided(self, denoiser: ConditionalDenoiser, request: int, specs: Sequence[SampleSpec]) -> GuidedDenoiser:
        spec, decode = self._job.requests[request], (self._guidance_decoder or self._model(request)).decode
        guidance = self._job.guidance_of(spec)
        if spec.method == "boundary":
            return guide_to_boundary(
                denoiser,
                guidance.boundary,
                logits=self._target.logits,
                decode=decode,
                classes=specs[0].cell.classes,
                num_samples=len(specs),
            )
        if spec.is_custom:
            scene = self._scene([one.cell.classes for one in specs])
            return guide_by(self._criteria[request], denoiser, guidance.custom, scene=scene, decode=decode)
        labels = torch.tensor([one.cell.classes[0] for one in specs], device=self._hardware.device)
        return guide_to_risk(
            denoiser,
            guidance.risky,
            logits=self._target.logits,
            conformity=self._scorer.conformity_to(labels, raw=guidance.risky.conformity == "raw"),
            decode=decode,
            labels=labels,
        )

    def _scene(self, classes: Sequence[tuple[int, ...]]) -> Scene:
        """What a criterion of the user's own can ask about samples of these classes."""
        return Scene(
            logits=self._target.logits,
            conformity=lambda images, labels: self._scorer.conformity_to(labels, raw=False)(images),
            labels=torch.tensor([one[0] for one in classes], device=self._hardware.device),
            classes=tuple(classes),
        )

    def _criterion(self, request: RequestPlan) -> Criterion:
        """The criterion of a request's own method, tried on two images."""
        address, where = request.spec.method, f"requests.{request.number}.method"
        planned = self._plan.identity["requests"][request.number]["method_digest"]
        # A plan that only counts shards knows no digests.
        if planned and method_digest(address) != planned:
            raise JobError(
                f"{where}: the file of '{address}' on this machine is not the one that the run was planned with; give"
                " all machines the same file"
            )
        parameters = self._job.guidance_of(request.spec).custom.parameters
        criteria = [load_method(address, parameters) for _ in range(2)]
        shape, scene = self._model(request.number).image_shape, self._scene([request.cells[0].classes] * 2)
        try:
            problem, drawn = watched(lambda: criterion_problem(criteria, scene, shape))
        except Exception as error:
            raise JobError(f"{where}: the criterion of '{address}' failed: {reason_of(error)}") from error
        if drawn:
            problem = f"draws random numbers ({', '.join(drawn)}); {NO_CHANCE}"
        if problem:
            raise JobError(f"{where}: the criterion of '{address}' {problem}")
        return _Watched(criteria[0], f"{where}: the criterion of '{address}'")

    def _address(self, request: int) -> str:
        return self._job.requests[request].diffusion or self._job.models.diffusion

    def _model(self, request: int) -> Diffusion:
        address = self._address(request)
        if address not in self._diffusion:
            if self._hardware.is_cuda:
                # A GPU holds one at a time; shards are sent to workers that hold theirs.
                self._diffusion.clear()
                torch.cuda.empty_cache()
            checks_safety = self._job.models.safety_checker == "auto"
            self._diffusion[address] = Diffusion.load(address, self._hardware, checks_safety=checks_safety)
        return self._diffusion[address]

    def _conditioner(self, request: RequestPlan) -> Conditioner:
        model, spec = self._model(request.number), request.spec.conditioning
        address = self._address(request.number)
        assert model.noiser is not None and spec is not None, "addresses are checked before models are loaded"
        if spec.noise_level >= model.noiser.num_levels:
            raise JobError(
                f"requests.{request.number}.conditioning.noise_level: {spec.noise_level} is not below the"
                f" {model.noiser.num_levels} of '{address}'"
            )
        planned = self._plan.identity["requests"][request.number]["conditioning"]
        digest = planned["images" if spec.artefact is None else "artefact"]
        return open_conditioner(request, address, self._target.labels, self._hardware.device, digest)

    def _check_combination(self, request: int) -> None:
        try:
            self._model(request).sampler(self._job.sampling_of(self._job.requests[request]))
        except ValueError as error:
            raise JobError(f"requests.{request}: {error}") from None


class _Watched:
    """A criterion that is watched while samples are made: what it did not do when it was tried it may do later.

    Its first call is made twice; that it draws from no global generator is seen at every call.

    Raises:
        JobError: its distances are not decided by the images.
    """

    def __init__(self, criterion: Criterion, name: str) -> None:
        self._criterion, self._name, self._is_first = criterion, name, True

    def __call__(self, images: Tensor, scene: Scene) -> Tensor:
        distances, drawn = watched(lambda: self._criterion(images, scene))
        is_same = not self._is_first or same_values(distances, self._criterion(images, scene))
        self._is_first = False
        if drawn:
            raise JobError(f"{self._name} draws random numbers ({', '.join(drawn)}); {NO_CHANCE}")
        if not is_same:
            raise JobError(f"{self._name} gives other distances for equal images when it is asked again; {NO_CHANCE}")
        return distances


def memory_within_reach() -> int:
    """Bytes of the GPU that this process holds already or could still get."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def load_scorer(job: JobSpec, device: str = "cpu") -> Scorer:
    """The models of a job that score and never sample."""
    return Scorer(
        Classifier.load(job.models.target, device),
        Clip.load(job.models.clip, device),
        [Classifier.load(address, device) for address in job.models.transfer],
        Classifier.load(job.models.oracle, device) if job.models.oracle else None,
        Clip.load(job.models.judge, device) if job.models.judge else None,
    )


def longest_prompts(request: RequestPlan) -> list[str]:
    """The prompts of a request with its longest class name, one a context: the likeliest to be too long."""
    cell = max(request.cells, key=lambda one: len(" ".join(one.names)))
    return [make_prompt(request.spec.prompt, cell, context) for context in request.spec.contexts]


def is_fault_of_machine(error: Exception) -> bool:
    """Whether an exception comes from the job, the memory or the device, and not from a sample."""
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, RiskforgeError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in _MACHINE_SIGNS)


def may_pass(error: BaseException) -> bool:
    """Whether an exception, or what caused it, is of a kind that comes and goes: files and networks."""
    if isinstance(error, OSError) and not isinstance(error, _LASTING):
        return True
    if any(sign in kind.__name__ for kind in type(error).__mro__ for sign in _NETWORK_SIGNS):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and may_pass(cause)


def _without_frames(outcome: list[SampleResult] | Exception) -> list[SampleResult] | Exception:
    """An exception of one of many samples lets its tensors go."""
    error: BaseException | None = outcome if isinstance(outcome, Exception) else None
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    return outcome


def _with_other_noise(spec: SampleSpec) -> SampleSpec:
    return dataclasses.replace(spec, seed=(spec.seed + 1) % MAX_SEED)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error, '')}"


def _failed(spec: SampleSpec, message: str) -> SampleResult:
    return SampleResult(record=failed_record(spec, redacted(message)[:500]), run={"batch_size": 1})


def _counts(health: GradientHealth, row: int) -> dict[str, Any]:
    return {
        "guided_steps": int(health.guided_steps[row]),
        "zero_gradients": int(health.zero[row]),
        "nonfinite_gradients": int(health.nonfinite[row]),
    }
