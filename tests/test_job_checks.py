"""Models of a job are refused by their files, before one is loaded."""

import pytest

from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.models.job_checks import check_addresses


def test_wrong_kinds_are_refused_before_loading(tmp_path):
    """A classifier as diffusion model or as CLIP, and impossible noise, are seen from the configurations."""
    raw = {
        "name": "job",
        "models": {"diffusion": "zoo:digits/clip", "clip": "zoo:digits/oracle", "target": "zoo:digits/classifier"},
        "requests": [{"name": "a", "method": "prompt", "classes": "all", "count": 1}],
        "output": {"uri": "runs/x"},
    }
    with pytest.raises(JobError) as caught:
        check_addresses(parse_job(raw))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["models.diffusion", "models.clip"]
    raw["models"] |= {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip"}
    check_addresses(parse_job(raw))
    raw["sampling"] = {"scheduler": "ddim", "rescale_betas_zero_snr": True}
    with pytest.raises(JobError, match=r"requests\.0\.sampling: eps-prediction has no signal"):
        check_addresses(parse_job(raw))
