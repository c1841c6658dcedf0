"""Every combination of scheduler, spacing, sigmas and prediction that is allowed gives diffusers' pixels.

Also every option that a model's own configuration may have, under every scheduler; what is not allowed is refused by
`plan --validate`, from the configurations alone.
"""

import inspect
import itertools
import json
from pathlib import Path

import diffusers
import pytest
import torch
import yaml

from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.methods.guidance.guided import MIN_SIGNAL
from engine.methods.sampling.denoiser import predicted_x0
from engine.methods.sampling.families import CLASSES, FAMILY, KINDS, KNOWN, ModelScheduler
from engine.methods.sampling.sampling_checks import sampling_problems
from engine.methods.sampling.schedulers import make_sampler
from engine.methods.sampling.spec import SamplingSpec
from engine.methods.sampling.training_checks import training_problems
from engine.models.diffusion import load_pipeline
from engine.models.job_checks import check_addresses
from tests.conftest import REPOSITORY
from tests.tiny_pipelines import BETAS, PROMPTS, by_diffusers, by_engine, edit, job_of, load_reference, save_pipeline

TOLERANCE = 1e-4
STEPS = 3
SPACINGS = (None, "leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction")
V_ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
# A UNet of one block: hundreds of samples are made with it.
SMALL = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
# Options of a model's own scheduler, each with the values that its scheduler knows.
OPTIONS = [
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": True},
    {"trained_betas": [0.0001 + 0.00001 * place for place in range(1000)]},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"steps_offset": 7},
    {"interpolation_type": "log_linear"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"final_sigmas_type": "sigma_min"},
    {"solver_order": 1},
    {"solver_order": 3},
    {"lower_order_final": False},
    {"euler_at_final": True},
    {"solver_type": "heun"},
    {"solver_type": "bh1"},
    {"lambda_min_clipped": -5.1},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver++"},
    V_ZERO,
    V_ZERO | {"timestep_spacing": "trailing"},
    V_ZERO | {"use_karras_sigmas": True},
    {"num_train_timesteps": 100},
    {"sigma_min": 0.03, "sigma_max": 10.0},
    {"predict_x0": False},
    {"disable_corrector": [0, 1]},
    {"skip_prk_steps": True},
    {"variance_type": "fixed_large"},
]


class Both:
    """One pipeline in both programs, whose scheduler is changed from comparison to comparison."""

    def __init__(self, folder: Path, hardware, *, is_unclip: bool) -> None:
        self.reference = load_reference(save_pipeline(folder, unet=SMALL, is_unclip=is_unclip))
        self.model = load_pipeline(str(folder), hardware)
        self.is_unclip = is_unclip
        self.prompts = PROMPTS if is_unclip else PROMPTS[:1]

    def problems(self, own: str, config: dict, spec: SamplingSpec, *, is_guided: bool = False) -> list[str]:
        """What is said of a combination before anything is loaded."""
        model = self.scheduler(own, config)
        return training_problems(model) or sampling_problems(model, spec, is_guided=is_guided)

    def scheduler(self, own: str, config: dict) -> ModelScheduler:
        config = BETAS | config | {"_class_name": own}
        return ModelScheduler(config=config, name=own, is_corrected=not self.is_unclip)

    def expected(self, own: str, config: dict, spec: SamplingSpec) -> torch.Tensor:
        """Of diffusers: the folder's scheduler is loaded, and another is made from it, with the job's wishes."""
        loaded = getattr(diffusers, own).from_config(BETAS | config | {"_class_name": own})
        pipeline = type(self.reference)(**self.reference.components | {"scheduler": loaded})
        wishes = {"timestep_spacing": spec.timestep_spacing, "use_karras_sigmas": spec.use_karras_sigmas}
        wishes |= {"algorithm_type": "dpmsolver++"} if spec.scheduler == "dpmsolver++" else {}
        options = {key: value for key, value in wishes.items() if value is not None}
        if options or spec.scheduler != "model":
            chosen = getattr(diffusers, CLASSES.get(spec.scheduler, own))
            made = chosen.from_config(pipeline.scheduler.config, **options)
            pipeline = type(self.reference)(**self.reference.components | {"scheduler": made})
        pipeline.set_progress_bar_config(disable=True)
        return by_diffusers(pipeline, spec.num_inference_steps, prompts=self.prompts)

    def made(self, own: str, config: dict, spec: SamplingSpec) -> torch.Tensor:
        """Of the engine."""
        self.model._scheduler = self.scheduler(own, config)
        asked = spec.model_dump(include={"scheduler", "timestep_spacing", "use_karras_sigmas"})
        return by_engine(self.model, spec.num_inference_steps, prompts=self.prompts, **asked)

    def compare(self, own: str, config: dict, spec: SamplingSpec) -> None:
        expected, images = self.expected(own, config, spec), self.made(own, config, spec)
        assert torch.isfinite(expected).all() and (images - expected).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def plain(tmp_path_factory, hardware):
    return Both(tmp_path_factory.mktemp("schedulers") / "plain", hardware, is_unclip=False)


@pytest.fixture(scope="module")
def unclip(tmp_path_factory, hardware):
    return Both(tmp_path_factory.mktemp("schedulers") / "unclip", hardware, is_unclip=True)


@pytest.fixture
def folder(tmp_path):
    return save_pipeline(tmp_path / "pipeline")


def asked_of(scheduler: str, **options) -> SamplingSpec:
    return SamplingSpec(scheduler=scheduler, num_inference_steps=STEPS, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheduler", CLASSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_combination_that_a_job_may_ask_for(scheduler, prediction, plain):
    """Scheduler, spacing, Karras sigmas and prediction type, as the authors of KLDB sample and as others do."""
    for spacing, karras in itertools.product(SPACINGS, (None, True)):
        spec = asked_of(scheduler, timestep_spacing=spacing, use_karras_sigmas=karras)
        kind = KNOWN[CLASSES[scheduler]]
        if (karras and not kind.has_sigmas) or (spacing and not kind.has_spacing):
            assert plain.problems("DDIMScheduler", {"prediction_type": prediction}, spec)
            continue
        assert plain.problems("DDIMScheduler", {"prediction_type": prediction}, spec) == []
        plain.compare("DDIMScheduler", {"prediction_type": prediction}, spec)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", KINDS)
def test_wishes_of_a_job_replace_what_the_models_own_scheduler_says(own, plain):
    """Spacing and sigmas with `scheduler: model`; Karras sigmas are refused where the scheduler has none."""
    config = {"prediction_type": "v_prediction", "skip_prk_steps": True}
    for spacing, karras in (("trailing", True), ("leading", False), ("linspace", None)):
        spec = asked_of("model", timestep_spacing=spacing, use_karras_sigmas=karras)
        problems = plain.problems(own, config, spec)
        if karras and not KINDS[own].has_sigmas:
            assert f"use_karras_sigmas: {own} has no sigmas; use lms" in problems[0]
        else:
            assert problems == []
            plain.compare(own, config, spec)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", FAMILY)
def test_the_schedulers_of_one_training_are_exchangeable(own, plain):
    """Whatever scheduler a folder was saved with; its own where that is known, refused by name where it is not."""
    for scheduler in (*CLASSES, "model"):
        # PNDM begins with steps that need four.
        spec = SamplingSpec(scheduler=scheduler, num_inference_steps=4 if own == "PNDMScheduler" else 2)
        problems = plain.problems(own, {}, spec)
        if scheduler == "model" and own not in KNOWN:
            assert f"'model' is a {own}, which draws noise" in problems[0] and "use one of lms, ddim" in problems[0]
        else:
            assert problems == []
            plain.compare(own, {}, spec)


def options_of(name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}


def pairs_of(options: dict) -> list[tuple[str, str]]:
    """Schedulers of folders that have some options, with those that a job asks for and that read one of them.

    Of the first kind one, and UniPC, which changes some of its own.
    """
    found = [name for name in FAMILY if options.keys() <= options_of(name)]
    owners = dict.fromkeys([found[0], *(one for one in found if one == "UniPCMultistepScheduler")])
    readers = [name for name, kind in CLASSES.items() if options.keys() & options_of(kind)]
    return list(itertools.product(owners, [*readers, "model"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", range(len(OPTIONS)), ids=lambda place: str(OPTIONS[place])[:50])
def test_an_option_of_the_models_own_scheduler_is_followed_or_refused(place, plain, unclip):
    """Carried into the scheduler that is asked for as diffusers carries it; a Stable unCLIP folder is not corrected."""
    options = OPTIONS[place]
    for both in (plain, unclip) if options.keys() & {"clip_sample", "steps_offset"} else (plain,):
        for own, scheduler in pairs_of(options):
            if not both.problems(own, options, asked_of(scheduler)):
                both.compare(own, options, asked_of(scheduler))


def test_every_option_of_the_schedulers_was_looked_at():
    """One that a later diffusers brings is in none of these lists."""
    refused = {"timestep_type", "use_flow_sigmas", "use_dynamic_shifting", "solver_p", "shift_terminal"}
    without_effect = {"flow_shift", "time_shift_type", "beta_start", "beta_end", "timestep_spacing"}
    tried = {option for options in OPTIONS for option in options} | {"prediction_type"}
    assert {one for name in FAMILY for one in options_of(name)} == tried | refused | without_effect


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_timesteps_that_would_stand_twice_are_refused(flag, plain):
    """diffusers starts at the second of two equal timesteps and runs past the last: no combination gets there."""
    num_refused = 0
    for noise, steps in itertools.product((V_ZERO, {"beta_schedule": "squaredcos_cap_v2"}, {}), (5, 30, 150)):
        own, spec = "DPMSolverMultistepScheduler", SamplingSpec(scheduler="model", num_inference_steps=steps)
        if plain.problems(own, noise | {flag: True}, spec):
            num_refused += 1
        else:
            make_sampler(spec, plain.scheduler(own, noise | {flag: True}))
    assert num_refused or flag == "use_beta_sigmas"


@pytest.mark.filterwarnings("ignore")
def test_numbers_of_steps_are_refused_where_their_timesteps_leave_the_training():
    """Against the schedulers themselves, for a training of 50 timesteps: no step outside, and no refusal in vain."""
    for name, scheduler in CLASSES.items():
        spacings = SPACINGS[1:] if KNOWN[scheduler].has_spacing else SPACINGS[:1]
        for spacing, steps in itertools.product(spacings, range(1, 53)):
            model = ModelScheduler(config=BETAS | {"num_train_timesteps": 50}, name=scheduler)
            spec = SamplingSpec(scheduler=name, num_inference_steps=steps, timestep_spacing=spacing)
            problems = sampling_problems(model, spec, is_guided=False)
            assert all("num_inference_steps" in one for one in problems)
            if steps > 50:
                assert problems
                continue
            made = getattr(diffusers, scheduler).from_config(model.config, **model.options(spec))
            made.set_timesteps(steps)
            fits = made.timesteps.min() >= 0 and made.timesteps.max() < 50 and len(made.timesteps) == steps
            assert bool(problems) == (not fits or len(made.timesteps.unique()) < steps)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheduler", [*CLASSES, "DEISMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_guidance_sees_the_noise_levels_of_every_combination(scheduler):
    """A perfect denoiser's output stands for the clean latents at every step: x0 of guidance is the scheduler's."""
    clean = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen, own = ("model", scheduler) if scheduler in KNOWN else (scheduler, "DDIMScheduler")
    for spacing, karras, zero in itertools.product(SPACINGS, (None, True), (False, True)):
        spec = asked_of(chosen, timestep_spacing=spacing, use_karras_sigmas=karras)
        model = ModelScheduler(config=BETAS | (V_ZERO if zero else {"prediction_type": "v_prediction"}), name=own)
        if sampling_problems(model, spec, is_guided=True):
            assert (karras and (zero or not KNOWN[CLASSES.get(scheduler, scheduler)].has_sigmas)) or scheduler == "lcm"
            continue
        sampler = make_sampler(spec, model)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        for step in sampler.steps():
            latents = step.scale * clean + step.sigma * noise
            norm = (step.scale**2 + step.sigma**2) ** 0.5
            output = (step.scale * noise - step.sigma * clean) / norm
            found = predicted_x0(output, latents, step, "v_prediction")
            assert (found - clean).abs().max() < 1e-3
            assert float(sampler._scheduler.alphas_cumprod[0]) > 0.9
            converted = sampler._scheduler.step(output, step.timestep, latents)
            for name in ("pred_original_sample", "denoised"):
                assert (getattr(converted, name, clean) - clean).abs().max() < 1e-3


def test_guidance_leaves_latents_without_signal_alone_whoever_steps():
    """At zero terminal SNR the first latents are noise: of DDIM by their scale, of Euler by their sigma."""
    for scheduler in ("ddim", "euler", "dpmsolver++"):
        model = ModelScheduler(config=BETAS | V_ZERO, name="DDIMScheduler")
        first, second, *_ = make_sampler(asked_of(scheduler, timestep_spacing="trailing"), model).steps()
        assert first.signal < MIN_SIGNAL < second.signal


@pytest.mark.parametrize(
    ("config", "sampling", "words"),
    [
        ({}, {"scheduler": "ddim", "use_karras_sigmas": True}, "sampling.use_karras_sigmas: ddim has no sigmas"),
        ({}, {"scheduler": "lms", "rescale_betas_zero_snr": True}, "zero terminal SNR is not defined for lms"),
        ({}, {"use_karras_sigmas": "often"}, "sampling.use_karras_sigmas: 'often' is not true or false"),
        ({}, {"scheduler": "model", "use_karras_sigmas": True}, "requests.0.sampling.use_karras_sigmas: DDIM"),
        ({"_class_name": "PNDMScheduler"}, {"scheduler": "model", "rescale_betas_zero_snr": True}, "PNDMScheduler"),
        ({"use_beta_sigmas": True}, {"use_karras_sigmas": True}, "only one can be"),
        ({"rescale_betas_zero_snr": True}, {"scheduler": "euler"}, "eps-prediction has no signal"),
        ({"timestep_spacing": "other"}, {}, 'timestep_spacing: "other"'),
        ({"interpolation_type": "cubic"}, {"scheduler": "euler"}, "interpolation_type"),
        ({"final_sigmas_type": "one"}, {"scheduler": "dpmsolver++"}, "final_sigmas_type"),
        ({"solver_order": 4}, {"scheduler": "dpmsolver++"}, "solver_order"),
        ({"num_train_timesteps": 100}, {"num_inference_steps": 101}, "above the 100 timesteps"),
        ({}, {"scheduler": "ddim", "num_inference_steps": 1000}, "in leading spacing leave"),
        ({}, {"timestep_spacing": "trailing", "num_inference_steps": 61}, "in trailing spacing reach below"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_at_validation(config, sampling, words, folder):
    """With the field and a remedy, before a model is loaded."""
    edit(folder / "scheduler" / "scheduler_config.json", **config)
    if "_class_name" in config:
        edit(folder / "model_index.json", scheduler=["diffusers", config["_class_name"]])
    with pytest.raises(JobError) as caught:
        check_addresses(job_of(folder, sampling=sampling))
    assert words in str(caught.value)


@pytest.mark.parametrize("own", KNOWN)
def test_guidance_is_refused_where_the_scheduler_forgets_its_shifts(own, folder):
    """A moved latent must be what the next step starts from: proved on the schedulers, by moving one."""
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=own)
    edit(folder / "model_index.json", scheduler=["diffusers", own])
    job = job_of(folder, method="boundary", sampling={"scheduler": "model", "num_inference_steps": 10})
    if KNOWN[own].is_guidable:
        check_addresses(job)
    else:
        with pytest.raises(JobError, match=f"'model' is a {own}, which would ignore how guidance moves"):
            check_addresses(job)
    assert (min(kept_share(own, place) for place in range(3)) > 0.99) == KNOWN[own].is_guidable


def kept_share(own: str, place: int) -> float:
    """How much of a shift of the latents at a step is in the next ones, at the same predicted noise."""

    def run(shift: float) -> torch.Tensor:
        torch.manual_seed(0)
        spec = SamplingSpec(scheduler="model", num_inference_steps=10)
        sampler = make_sampler(spec, ModelScheduler(config=BETAS | {"skip_prk_steps": True}, name=own))
        latents = torch.ones(1, 1, 2, 2) * sampler.init_noise_sigma
        for step in itertools.islice(sampler.steps(), place + 1):
            latents = latents + (shift if step.index == place + 1 else 0.0)
            noise = torch.full_like(latents, 0.1)
            latents = sampler._scheduler.step(noise, step.timestep, latents, return_dict=False)[0]
        return latents

    return float((run(1.0) - run(0.0)).mean())


@pytest.mark.parametrize(("limit", "scheduler"), [("thresholding", "ddim"), ("thresholding", "dpmsolver++")])
def test_guidance_is_refused_where_the_predicted_image_is_limited(limit, scheduler, folder):
    """Guidance would look at another image than the one that the scheduler steps to; without guidance it runs."""
    edit(folder / "scheduler" / "scheduler_config.json", **{limit: True})
    check_addresses(job_of(folder, sampling={"scheduler": scheduler}))
    with pytest.raises(JobError, match=f"limits the predicted image .{limit} of"):
        check_addresses(job_of(folder, method="boundary", sampling={"scheduler": scheduler}))
    check_addresses(job_of(folder, method="boundary", sampling={"scheduler": "euler"}))


# Digests of the plans of jobs/, with stand-ins for the models, from before Karras sigmas were a field.
DIGESTS = {
    "augment-digits": "76c445ba111a961e65bca91c47d2e17f",
    "imagenet-kldb": "c85196df091fd06a585dbfb15ce3b233",
    "imagenet-riskydiff": "04934aa24818ddec85d9c932f5996754",
    "nightly-stress": "938376419825cc48369058a0ac7869b4",
    "quickstart-cifar10": "466d4c76cf4eef910b2257a06a98ddcf",
    "quickstart": "1f73dac6bcaf518090db557f88422d37",
    "riskydiff-digits": "13808c8585a12b3e8343d629cb52050a",
    "riskydiff-mixtures": "212a90b6a13417f415ecf2e94a960a8e",
}


def digest_of_job(raw: dict) -> str:
    job = parse_job(json.loads(json.dumps(raw).replace('"fresh": true', '"fresh": "2026-01-01"')))
    named = [one for request in raw["requests"] for key in ("classes", "boundary") for one in request.get(key, [])]
    labels = list(dict.fromkeys(str(one) for one in named if len(str(one)) > 1)) or ["a", "b"]
    sources = [one.conditioning.artefact or one.conditioning.images for one in job.requests if one.conditioning]
    digests = {
        "diffusion": dict.fromkeys(sorted({one.diffusion or job.models.diffusion for one in job.requests}), "d"),
        "clip": "c",
        "target": "t",
        "transfer": ["f"] * len(job.models.transfer),
        "oracle": "o" if job.models.oracle else "",
        "conditioning": dict.fromkeys(sources, "s"),
    }
    if job.models.oracles:
        digests["oracles"] = ["o"] * len(job.models.oracles)
    return build_plan(job, labels, digests).digest


@pytest.mark.parametrize("name", DIGESTS)
def test_plans_of_jobs_keep_their_digests(name):
    """A field at its default is no new plan; one that is set is."""
    raw = yaml.safe_load((REPOSITORY / "jobs" / f"{name}.yaml").read_text())
    assert digest_of_job(raw) == DIGESTS[name]
    for one in (raw, *raw["requests"]):
        one["sampling"] = one.get("sampling", {}) | {"scheduler": "euler"}
    before = digest_of_job(raw)
    raw["sampling"]["use_karras_sigmas"] = None
    assert digest_of_job(raw) == before
    raw["sampling"]["use_karras_sigmas"] = True
    assert digest_of_job(raw) != before
