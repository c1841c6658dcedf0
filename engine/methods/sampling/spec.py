"""How a job samples, whatever the method."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, StrictInt

from engine.methods.fields import Context, Number, Spec

# Of an image; the factor that its sides must be multiples of is the model's.
_Side = Annotated[StrictInt, Field(ge=8, le=8192)]


class SamplingSpec(Spec):
    """How the diffusion model samples. Whatever a scheduler draws is of the sample's own seed."""

    scheduler: Literal["lms", "ddim", "euler", "dpmsolver++", "lcm", "model"] = Field(
        default="lms",
        description="Sampler: k-LMS, DDIM with eta 0, Euler, DPM-Solver++ (2M), LCM for models that are distilled to a"
        " few steps, or the model's own.",
    )
    num_inference_steps: StrictInt = Field(default=40, ge=1, le=1000, description="Number of denoising steps T.")
    guidance_scale: Number = Field(default=7.5, ge=1, le=100, description="Classifier-free guidance scale; 1 is off.")
    guidance_rescale: Number = Field(default=0.0, ge=0, le=1, description="Rescale of classifier-free guidance.")
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        default=None, description="Spacing of the timesteps; the model's own when empty."
    )
    use_karras_sigmas: bool | None = Field(
        default=None,
        description="Noise levels of Karras et al. (2022), for lms, euler and dpmsolver++; as the model has it when"
        " empty.",
    )
    rescale_betas_zero_snr: bool = Field(default=False, description="Zero terminal SNR; v-prediction models only.")
    negative_prompt: Context = Field(default="", description="Prompt of the unconditional half.")
    height: _Side | None = Field(
        default=None,
        description="Of the images in pixels, a multiple of the model's pixels per latent; the model's own when empty.",
    )
    width: _Side | None = Field(default=None, description="As `height`.")

    def image_size(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the images in pixels, of a model whose own size is given."""
        return self.height or own[0], self.width or own[1]

    @pydantic.model_serializer(mode="wrap")
    def _without_absent(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Sampling in the model's own size is stored as it was before there was a choice."""
        sizes = ("height", "width")
        return {key: value for key, value in dump(self).items() if key not in sizes or value is not None}


def noise_problem(prediction_type: str, zero_snr: bool) -> str | None:
    """Why a model's prediction type is not supported, or None."""
    if prediction_type not in ("epsilon", "v_prediction"):
        return f"the model predicts '{prediction_type}'; only epsilon and v_prediction are supported"
    if zero_snr and prediction_type == "epsilon":
        return "eps-prediction has no signal at zero terminal SNR; switch that off, or use a v-prediction model"
    return None


def steps_of(strength: float, num_steps: int) -> int:
    """Denoising steps that a start from real images takes of `num_steps`: `floor(strength * T)` (SDEdit).

    By the decimal digits of the strength: 0.29 of 100 steps are 29, although the product of the floats is below.
    """
    return int(Fraction(repr(strength)) * num_steps)
