"""Checkpoints of one file: refused with a line that makes a folder of them."""

from __future__ import annotations

import shlex

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import JobError
from engine.models.job_checks import check_addresses
from tests.tiny_pipelines import job_of


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "StableDiffusionPipeline"),
        ("conditioner.embedders.1.model.ln_final.weight", "StableDiffusionXLPipeline"),
        ("model.diffusion_model.joint_blocks.0.x_block.weight", "StableDiffusion3Pipeline"),
    ],
)
def test_a_checkpoint_is_refused_with_the_line_that_converts_it(tmp_path, tensor, kind):
    """Of the pipeline that its tensors are of; the line is a command of Python that can be run."""
    path = tmp_path / "it's mine.safetensors"
    save_file({tensor: torch.zeros(1)}, path)
    with pytest.raises(JobError, match=rf"models\.diffusion: .*diffusers\.{kind}\.from_single_file") as caught:
        check_addresses(job_of(path))
    line = str(caught.value).partition("new folder: ")[2].partition(" (FOLDER")[0]
    python, option, code = shlex.split(line)
    assert (python, option) == ("python", "-c") and str(path) in code
    compile(code, "line", "exec")


def test_files_that_are_damaged_or_nothing_of_that_kind(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"1234")
    with pytest.raises(JobError, match=r"models\.diffusion: .*torn\.safetensors is damaged"):
        check_addresses(job_of(tmp_path / "torn.safetensors"))
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(JobError, match=r"models\.diffusion: .*from_single_file"):
        check_addresses(job_of(tmp_path / "model.ckpt"))
