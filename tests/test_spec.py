"""The job file: every mistake is named with its field, its value and a remedy, all of them at once."""

import copy
import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import JobError
from engine.job.parsing import apply_overrides, job_schema, parse_job
from tests.job_cases import ENGINE_JOBS

JOB = {
    "name": "job",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion",
        "clip": "zoo:digits/clip",
        "target": "zoo:digits/classifier",
    },
    "requests": [{"name": "between", "method": "boundary", "boundary": ["three", "eight"], "count": 4}],
    "output": {"uri": "runs/job"},
}
PLAIN = {"name": "plain", "method": "prompt", "classes": "all", "count": 1}


def job(**changes):
    return copy.deepcopy(JOB) | changes


def request(**changes):
    return job(requests=[JOB["requests"][0] | changes])


def resources(**fields):
    return job(runtime={"resources": fields})


def problems(raw) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_job(raw)
    return caught.value.problems


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (job(naem="x"), "naem: unknown key; did you mean 'name'?"),
        (resources(gpus=1), "runtime.resources.gpus: unknown key; did you mean 'num_gpus'?"),
        (resources(num_gpus=-1), "runtime.resources.num_gpus: -1 is below 0; give 0 or more"),
        (resources(num_gpus=float("nan")), "runtime.resources.num_gpus: nan is not a finite number"),
        (resources(num_gpus=1.5), "num_gpus: 1.5 cannot be used: above 1 only whole GPUs can be taken; give a whole"),
        (resources(num_gpus=1e-3), "num_gpus: 0.001 cannot be used: so small a part of a GPU holds no model; give"),
        (resources(custom={"GPU": 1}), "custom: {'GPU': 1} cannot be used: 'GPU' is not a custom resource; give num_g"),
        (resources(custom={"a": 1.5}), "a: 1.5 is no amount; give a whole number, or a part such as 0.5"),
        (resources(custom={"": 1}), "a resource needs a name of 1 to 100 printable characters"),
        (resources(custom=dict.fromkeys(map(str, range(21)), 1)), "it has 21 entries; give 20 or fewer"),
        (resources(label_selector={"a b": "c"}), "'a b' cannot be the key of a label; write it as `zone`"),
        (resources(label_selector={"zone": "in()"}), "zone: 'in()' selects nothing; write a value, `!value`"),
        (job(runtime={"device": "cpu", "resources": {"num_gpus": 0.5}}), "device 'cpu' uses none; leave one of them"),
        (job(runtime={"device": "cuda", "resources": {"num_gpus": 0}}), "device 'cuda' needs one; leave num_gpus out"),
        (job(name="Has Space"), "name: 'Has Space' may hold only a-z, 0-9 and inner hyphens"),
        (job(name="a.b"), "name: 'a.b' may hold only a-z, 0-9 and inner hyphens"),
        (job(seed=-1), "seed: -1 is below 0; give 0 or more"),
        (job(seed=2**53), "seed: 9007199254740992 is not below 9007199254740992; give less than 9007199254740992"),
        (job(seed=True), "seed: True is not a whole number"),
        (job(requests=[]), "requests: []"),
        (job(sampling={"scheduler": "ddpm"}), "sampling.scheduler: 'ddpm' draws noise at every step"),
        (job(sampling={"scheduler": "eular"}), "did you mean 'euler'?"),
        (job(sampling={"guidance_scale": True}), "sampling.guidance_scale: True is not a number"),
        (job(sampling={"guidance_scale": float("nan")}), "sampling.guidance_scale: nan"),
        (job(sampling={"num_inference_steps": 0}), "sampling.num_inference_steps: 0"),
        (
            job(sampling={"rescale_betas_zero_snr": True}),
            "sampling.rescale_betas_zero_snr: zero terminal SNR is not defined for lms",
        ),
        (job(runtime={"batch_size": 0}), "runtime.batch_size: 0"),
        (job(runtime={"device": "tpu"}), "runtime.device: 'tpu'"),
        (job(guidance={"boundary": {"stp": 1}}), "guidance.boundary.stp: unknown key; did you mean 'step'?"),
        (job(output={"uri": ""}), "output.uri: ''"),
        (request(method="boundry"), "requests.0.method: 'boundry' is not one of prompt, boundary, risky"),
        (request(method="risky"), "requests.0.boundary: method 'risky' makes samples of single classes"),
        (request(method="risky", boundary=None), "requests.0.classes: missing; give class names or `all`"),
        (request(max_attempts=3), "requests.0.max_attempts: has no effect without `accept`"),
        (request(max_attempts=4.0), "requests.0.max_attempts: 4.0 is neither a number of attempts a class, such as"),
        (request(max_attempts="4"), "requests.0.max_attempts: '4' is neither a number of attempts a class, such as"),
        (
            request(accept={"is_error": True}, max_attempts=3),
            "requests.0.max_attempts: 3 is 3 attempts a class, fewer than the 4 samples wanted of it",
        ),
        (
            request(accept={"is_error": True}, max_attempts="0.5x"),
            "requests.0.max_attempts: '0.5x' is 2 attempts a class, fewer than the 4 samples wanted of it",
        ),
        (request(accept={"is_eror": True}), "requests.0.accept.is_eror: unknown condition"),
        (request(accept={"oracle": "agrees"}), "requests.0.accept.oracle: there is no oracle"),
        (request(accept={"risk": "2"}), "requests.0.accept.risk: '2' is not a comparison; write it as '>= 0.2'"),
        (job(guidance={"risky": {"target_risk": -1}}), "guidance.risky.target_risk: -1"),
        (request(boundary=None), "requests.0.boundary: method 'boundary' needs the classes"),
        (request(boundary=["three"]), "requests.0.boundary: ['three'] has fewer than two classes"),
        (request(boundary=["three", "three"]), "requests.0.boundary: ['three', 'three'] names a class twice"),
        (request(classes="all"), "requests.0.classes: give either `classes` or `boundary`"),
        (request(count=0), "requests.0.count: 0"),
        (request(count=1.5), "requests.0.count: 1.5 is not a whole number"),
        (request(count=10**9), "requests.0.count: 1000000000"),
        (request(contexts=["", ""]), "requests.0.contexts: a context is duplicated"),
        (request(contexts=[]), "requests.0.contexts: []"),
        (request(prompt="{classs}"), "requests.0.prompt: unknown field {classs}"),
        (request(method="prompt", boundary=None), "requests.0.classes: missing"),
        (request(method="prompt", boundary=None, classes=["a"], prompt="x"), "requests.0.prompt: has no {class}"),
        (request(sampling={"scheduler": "x"}), "requests.0.sampling.scheduler: 'x' is not one of lms"),
        (
            request(sampling={"num_inference_steps": 5}, guidance={"boundary": {"preset": "adversarial"}}),
            "requests.0.guidance.boundary: leaves none of 5 steps guided",
        ),
        (
            request(
                method="risky",
                boundary=None,
                classes=["a"],
                guidance={"risky": {"preset": "adversarial", "gradient_range": 0.01}},
            ),
            "requests.0.guidance.risky: leaves none of 40 steps guided; widen `gradient_range` or add steps",
        ),
        (
            request(sampling={"num_inference_steps": 4}, guidance={"boundary": {"gradient": "unet"}}),
            "requests.0.guidance.boundary: leaves none of 4 steps guided; lower `every` or add steps",
        ),
        (job(runtime={"compile": "yes"}), "runtime.compile: 'yes' is not one of auto, on, off"),
        (
            job(models=JOB["models"] | {"guidance_decoder": "x"}, requests=[PLAIN]),
            "models.guidance_decoder: no request is guided",
        ),
        (job() | {"int": 1}, "int: unknown key"),
        (request(guidance={"boundary": {"every": 0}}), "requests.0.guidance.boundary.every: 0"),
        ([], "job: a mapping of keys is expected, not list"),
        (None, "job: a mapping of keys is expected, not NoneType"),
    ],
)
def test_a_wrong_job_is_refused_with_field_and_remedy(raw, expected):
    """Each line is what a user reads; the start is the path of the field."""
    assert any(expected in problem for problem in problems(raw)), problems(raw)


def test_all_problems_are_told_at_once():
    """Mistakes of types, of keys and between fields, in several requests, come together."""
    raw = job(
        seed=-1,
        requests=[
            {"name": "a", "method": "boundry", "boundary": ["three", "eight"], "count": 1},
            {"name": "b", "method": "prompt", "boundary": ["three"], "classes": "all", "count": 1},
            {"name": "b", "method": "prompt", "classes": "all", "count": 0},
        ],
    )
    found = "\n".join(problems(raw))
    for part in ("seed:", "requests.0.method", "requests.1.classes", "requests.1.boundary", "requests.2.count"):
        assert part in found
    assert "requests.2.name: 'b' is also the name of request 1" in found


def test_overrides_of_a_request_are_merged_key_by_key():
    """A request's sampling changes what it names and keeps the job's rest; yaml's bare `on` is the word."""
    spec = parse_job(
        request(sampling={"guidance_scale": 6}, guidance={"boundary": {"alpha": 0.1, "step": "norm"}})
        | {"sampling": {"num_inference_steps": 20}, "guidance": {"boundary": {"every": 2}}}
        | {"runtime": yaml.safe_load("{gradient_checkpointing: on, compile: off, channels_last: on}")}
    )
    sampling, guidance = spec.sampling_of(spec.requests[0]), spec.guidance_of(spec.requests[0])
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (20, 6)
    assert (guidance.boundary.every, guidance.boundary.step_size, guidance.boundary.step) == (2, 0.1, "norm")
    runtime = spec.runtime
    assert (runtime.gradient_checkpointing, runtime.compile, runtime.channels_last) == ("on", "off", "on")


def test_set_reaches_lists_and_new_sections():
    """`--set` paths go through lists by number and create sections; a wrong path is named."""
    raw = apply_overrides(JOB, [("requests.0.count", 6), ("sampling.scheduler", "ddim")])
    assert parse_job(raw).requests[0].count == 6 and parse_job(raw).sampling.scheduler == "ddim"
    assert JOB["requests"][0]["count"] == 4
    for place in ("7", "-1", "+0", "first"):
        with pytest.raises(JobError, match=rf"--set requests\.{re.escape(place)}\.count"):
            apply_overrides(JOB, [(f"requests.{place}.count", 6)])


def test_a_schedule_without_a_guided_step_is_refused():
    """Where steps are counted from one, a guided fifth of four is none."""
    guided = {"guidance": {"boundary": {"every": 5, "counted_from": "start"}}}
    assert parse_job(request(sampling={"num_inference_steps": 5}, **guided))
    [line] = problems(request(sampling={"num_inference_steps": 4}, **guided))
    assert line == "requests.0.guidance.boundary: leaves none of 4 steps guided; lower `every` or add steps"


def test_the_samples_of_a_class_are_counted_over_its_contexts():
    """An index has eight digits in a key."""
    assert parse_job(request(count=5 * 10**7, contexts=["", "small"]))
    [line] = problems(request(count=5 * 10**7 + 1, contexts=["", "small"]))
    assert line == "requests.0.count: 50000001 x 2 contexts is above 100000000 a class"


def test_schema_describes_every_field():
    """The JSON Schema is what editors show: every property says what it is."""
    schema = job_schema()
    assert json.dumps(schema)
    specs = ("SamplingSpec", "RequestSpec", "RuntimeSpec", "ModelsSpec")
    described = {name: field for spec in specs for name, field in schema["$defs"][spec]["properties"].items()}
    assert {"deterministic", "compile", "channels_last", "guidance_decoder"} <= set(described)
    assert all("description" in field for field in described.values())


def test_jobs_in_the_repository_are_valid():
    """What we ship must pass its own check."""
    assert ENGINE_JOBS
    for path in ENGINE_JOBS:
        parse_job(yaml.safe_load(path.read_text()))


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_job_makes_a_traceback(data):
    """Any value at any place is either a job or a list of problems."""
    raw = copy.deepcopy(JOB)
    places = ["name", "seed", "models", "requests", "sampling", "guidance", "output", "runtime"]
    raw[data.draw(st.sampled_from(places))] = data.draw(anything)
    key = data.draw(st.sampled_from(["name", "classes", "boundary", "contexts", "sampling", "guidance", "prompt"]))
    if isinstance(raw["requests"], list) and raw["requests"] and isinstance(raw["requests"][0], dict):
        raw["requests"][0][key] = data.draw(anything)
    try:
        parse_job(raw)
    except JobError as error:
        assert error.problems
