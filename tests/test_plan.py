"""Plans: keys, seeds, growth, and memory that does not grow with the samples."""

import json
import subprocess
import sys
import tracemalloc

import pytest

from engine.errors import JobError
from engine.job.json_values import difference, digest_of
from engine.job.parsing import parse_job
from engine.job.plan import Plan, build_plan, class_index, next_stage, sample_seed

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGESTS = {"diffusion": {"d": "1"}, "clip": "2", "target": "3", "transfer": [], "oracle": ""}


def make_job(*requests, samples_per_shard=16, **changes):
    raw = {
        "name": "job",
        "models": {"diffusion": "d", "clip": "c", "target": "t"},
        "requests": list(requests),
        "output": {"uri": "runs/job", "samples_per_shard": samples_per_shard},
    }
    return parse_job(raw | changes)


def prompt_request(name="all", count=3, classes="all", **changes):
    return {"name": name, "method": "prompt", "classes": classes, "count": count} | changes


def boundary_request(name="between", count=20, boundary=("three", "eight"), **changes):
    return {"name": name, "method": "boundary", "boundary": list(boundary), "count": count} | changes


def all_samples(plan: Plan):
    return [one for shard in plan.shards() for one in plan.samples(shard)]


def test_every_sample_is_planned_once():
    """Counts, unique keys, contexts crossed with classes, shards numbered without gaps."""
    plan = build_plan(make_job(boundary_request(), prompt_request(contexts=["", "small"])), DIGITS, DIGESTS)
    samples = all_samples(plan)
    assert len(samples) == plan.num_samples == 20 + 3 * 10 * 2
    assert len({one.key for one in samples}) == len(samples)
    assert [shard.number for shard in plan.shards()] == list(range(plan.num_shards))
    small = [one for one in samples if one.context == "small"]
    assert len(small) == 30 and {one.cell.names[0] for one in small} == set(DIGITS)
    assert samples[0].key == "job-000-mix-00000000" and samples[20].key == "job-001-000-00000000"
    with pytest.raises(IndexError, match="is not in a plan of"):
        plan.shard(plan.num_shards)


def test_prompts():
    """Joint prompts join the class names; contexts are appended; templates and synonyms are honoured."""
    job = make_job(
        boundary_request(contexts=["", "red ink"], count=1),
        prompt_request(classes=["tabby cat"], prompt="a {context} drawing of {class}", contexts=["small"], count=1),
        samples_per_shard=1,
    )
    labels = ["tench, Tinca tinca", "tabby, tabby cat", "dark_horse"]
    with pytest.raises(JobError, match="three"):
        build_plan(job, labels, DIGESTS)
    job = make_job(
        boundary_request(boundary=("tench", "dark_horse"), contexts=["", "red ink"], count=1),
        prompt_request(classes=["tabby cat"], prompt="a {context} drawing of {class}", contexts=["small"], count=1),
    )
    texts = [one.prompt for one in all_samples(build_plan(job, labels, DIGESTS))]
    assert texts == ["tench and dark horse", "tench and dark horse, red ink", "a small drawing of tabby"]


def test_unknown_classes_offer_the_nearest():
    """All unknown classes of all requests at once, by field."""
    job = make_job(boundary_request(boundary=("thre", "eight")), prompt_request(classes=[12, "Nine"]))
    with pytest.raises(JobError) as caught:
        build_plan(job, DIGITS, DIGESTS)
    assert caught.value.problems == [
        "requests.0.boundary.0: 'thre' is not a class of the target; did you mean 'three'?",
        "requests.1.classes.0: 12 is not a class index of the target; it has 0 to 9",
    ]
    for index in (-1, 10):
        with pytest.raises(JobError, match=f"{index} is not a class index"):
            class_index(index, DIGITS)


def test_ambiguous_names_are_refused():
    """ImageNet has two cranes: the first of them is not what everybody means."""
    job = make_job(prompt_request(classes=["crane"]))
    with pytest.raises(JobError, match=r"'crane' is the name of classes 0, 2; give the index"):
        build_plan(job, ["crane", "ox", "crane"], DIGESTS)
    assert build_plan(make_job(prompt_request(classes=[2])), ["crane", "ox", "crane"], DIGESTS).num_samples == 3


def test_one_class_by_name_and_by_index_is_refused():
    """The same class twice would make two samples of one key."""
    with pytest.raises(JobError, match="named before"):
        build_plan(make_job(prompt_request(classes=["three", 3])), DIGITS, DIGESTS)


def test_seeds_are_shared_within_a_group_and_nowhere_else():
    """Index by index in one group; the order of a subset does not matter; every part changes the seed."""
    job = make_job(
        boundary_request(),
        boundary_request("plain", seed_group="between", method="prompt", boundary=("eight", "three")),
        boundary_request("other"),
    )
    plan = build_plan(job, DIGITS, DIGESTS)
    seeds = [[one.seed for one in all_samples(plan) if one.request == name] for name in ("between", "plain", "other")]
    assert seeds[0] == seeds[1] and not set(seeds[0]) & set(seeds[2])
    assert len(set(seeds[0])) == 20 and all(0 <= seed < 2**53 for seed in seeds[0])
    base = sample_seed(0, "g", (3,), 1)
    others = [sample_seed(1, "g", (3,), 1), sample_seed(0, "h", (3,), 1), sample_seed(0, "g", (4,), 1)]
    assert base not in [*others, sample_seed(0, "g", (3,), 2)]


def test_seeds_do_not_change_between_versions():
    """Golden values: a change here breaks every published data set."""
    assert sample_seed(0, "between", (3, 8), 0) == 2518066115396488
    assert sample_seed(7, "everything", (9,), 123) == 7663864465822126


def test_grown_counts_append_shards():
    """Old shards keep number and samples, new ones follow; nothing is planned twice; shrinking is refused."""
    old = build_plan(make_job(boundary_request(count=20), prompt_request(count=1)), DIGITS, DIGESTS)
    job = make_job(boundary_request(count=50), prompt_request(count=2))
    grown = build_plan(job, DIGITS, DIGESTS)
    assert grown.digest == old.digest
    plan = Plan(grown.requests, grown.identity, (*old.stages, next_stage(grown.requests, old.stages, 16)))
    assert [plan.shard(number) for number in range(old.num_shards)] == list(old.shards())
    assert {one.key for one in all_samples(plan)} == {one.key for one in all_samples(grown)}
    assert len(all_samples(plan)) == plan.num_samples == 70
    with pytest.raises(JobError, match=r"requests\.0\.count: 20 is below the 50 already planned"):
        next_stage(old.requests, plan.stages, 16)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"sampling": {"guidance_scale": 5.0}}, "requests.0.sampling.guidance_scale: 7.5 -> 5.0"),
        ({"guidance": {"boundary": {"every": 2}}}, "requests.0.guidance.every: 3 -> 2"),
    ],
)
def test_digest_follows_what_decides_pixels(changes, path):
    """A change of seed, sampling or guidance changes the digest, and the difference names it."""
    old, new = (build_plan(make_job(boundary_request(), **one), DIGITS, DIGESTS) for one in ({}, changes))
    assert old.digest != new.digest
    assert path in difference(old.identity, new.identity)


def test_a_tolerance_is_in_the_identity_where_it_changes_samples():
    """Plans and jobs from before there was one have no such key, and go on; a request may take it back."""
    jobs = [
        make_job(
            boundary_request(guidance={"boundary": own}),
            guidance={"boundary": {"preset": "adversarial", "tolerance": 0.1}},
        )
        for own in ({"tolerance": 0.0}, {})
    ]
    plain, wide = (build_plan(job, DIGITS, DIGESTS) for job in jobs)
    old = make_job(boundary_request(), guidance={"boundary": {"preset": "adversarial"}})
    assert "tolerance" not in old.model_dump()["guidance"]["boundary"]
    guidance = [plan.identity["requests"][0]["guidance"] for plan in (plain, wide)]
    assert set(guidance[0]) == {"step", "alpha", "cap", "every", "gradient", "skip_last"}
    assert guidance[1] == guidance[0] | {"tolerance": 0.1}
    assert "requests.0.guidance.tolerance" in "".join(difference(plain.identity, wide.identity))


def test_every_request_has_the_digest_of_its_own_pipeline():
    """And the models that all of them share are listed once; its rule of acceptance decides what is kept."""
    rule = {"is_error": True, "conformity": ">= 0.2"}
    job = make_job(prompt_request(), prompt_request("own", diffusion="e", accept=rule, max_attempts="1x"))
    digests = DIGESTS | {"diffusion": {"d": "1", "e": "9"}, "conditioning": {"x": "5"}, "judge": "4"}
    identity = build_plan(job, DIGITS, digests).identity
    assert [request["diffusion"] for request in identity["requests"]] == ["1", "9"]
    assert [request["accept"] for request in identity["requests"]] == [{}, rule]
    assert identity["models"] == {"clip": "2", "target": "3", "transfer": [], "oracle": "", "judge": "4"}


def test_digest_ignores_what_does_not():
    """Runtime, place of the output, counts, order of keys, unused guidance."""
    job = make_job(prompt_request())
    same = make_job(prompt_request(count=9), runtime={"workers": 3}, guidance={"boundary": {"every": 2}})
    assert build_plan(job, DIGITS, DIGESTS).digest == build_plan(same, DIGITS, DIGESTS).digest
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_a_billion_samples_take_constant_memory():
    """Planning and reaching any shard must not list samples or shards."""
    tracemalloc.start()
    job = make_job(prompt_request(count=10**8), samples_per_shard=256)
    plan = build_plan(job, DIGITS, DIGESTS)
    assert plan.num_samples == 10**9
    last = list(plan.samples(plan.shard(plan.num_shards - 1)))
    assert last[-1].key == "job-000-009-99999999"
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


def test_the_digest_is_the_same_in_another_process():
    """Hash randomisation of a process must not reach the digest."""
    code = "from tests.test_plan import *; print(build_plan(make_job(boundary_request()), DIGITS, DIGESTS).digest)"
    out = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert out[0] == out[1] != ""
    assert json.dumps(out[0].strip()) == json.dumps(build_plan(make_job(boundary_request()), DIGITS, DIGESTS).digest)
