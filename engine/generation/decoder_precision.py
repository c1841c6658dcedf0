"""The precision in which guidance differentiates a decoder: half where its gradients keep their direction.

Half precision halves the memory of the decoder's graph and doubles the speed of what is nearly all of guidance's cost.
Which direction survives depends on decoder, pipeline and criterion, so that it is measured for each of them, with
samples that do not depend on the batch: workers on equal GPUs decide alike. What it may lose is measured too: by what
rounding the image to 8 bits does to the gradient, as that is done to every image that is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import JobError
from engine.generation.faults import is_fault_of_machine, release
from engine.generation.notices import Notices
from engine.methods.guidance.scene import Decoding
from engine.models.decoder_checks import FLOAT16_OVERFLOWS
from engine.models.decoding import EXACT, Decoder
from engine.models.factories import reason_of
from engine.models.hardware import Hardware

# Samples of a trial, from the noise of the request's first ones. With two, one odd gradient decides.
TRIAL_SAMPLES = 4
LOW_QUANTILE = 0.05
# Of 20 gradients one may be off by more than 8 degrees,
GOOD_COSINE = 0.99
# or, up to 26 degrees,
LOWEST_COSINE = 0.9
# by more than twice what images in 8 bits are off by. On the zoos bfloat16 is off by 0.9 to 1.5 times that angle, and
# guides as well as float32 (docs/results.md); twice leaves room for the scatter of a trial's few samples.
MOST_TIMES_8_BITS = 2.0

# Gives the cosines [2, n] of a request's gradients to those in float32: with a decoding, and with images in 8 bits.
Trial = Callable[[Decoding], Tensor]


class Subject(NamedTuple):
    """What one decision is about: addresses of a pipeline and its decoder (empty: its own), and a method."""

    pipeline: str
    decoder: str
    method: str


class DecoderPrecisions:
    """Decisions of a worker, each made once.

    Args:
        hardware: where the decoders run, and what the job says.
        notices: take each decision with its figures.
    """

    def __init__(self, hardware: Hardware, notices: Notices) -> None:
        self._hardware = hardware
        self._notices = notices
        self._decided: dict[Subject, str] = {}

    def of(self, subject: Subject) -> str:
        """The precision that was decided on: the name of a torch type; float32 before."""
        return self._decided.get(subject, EXACT)

    def decide(
        self,
        where: str,
        subject: Subject,
        decoder: Decoder,
        shape: tuple[int, ...],
        trial: Trial,
    ) -> None:
        """Decide for a request, unless another with the same subject has.

        Args:
            where: of the request, for notices.
            shape: of a sample's latents.
            trial: of the request.

        Raises:
            JobError: float16 is asked for, and the decoder's values would overflow.
        """
        if subject in self._decided:
            return
        wanted = self._hardware.decoder_precision
        if wanted == "auto":
            self._decided[subject] = self._measured(where, decoder, shape, trial)
            return
        if wanted == "float16" and not decoder.is_safe_in_float16:
            address = subject.decoder or subject.pipeline
            raise JobError(f"runtime.decoder_precision: the decoder of '{address}' {FLOAT16_OVERFLOWS}")
        self._decided[subject] = wanted

    def _measured(self, where: str, decoder: Decoder, shape: tuple[int, ...], trial: Trial) -> str:
        precision = decoder.trial_precision()
        if precision == EXACT:
            return EXACT
        try:
            cosines = trial(decoder.decoding(shape, precision))
        except Exception as error:
            if is_fault_of_machine(error):
                raise
            release(error)
            # Of the memory, or of a sample: it is treated where batches are made.
            self._notices.add(
                f"{where}: the decoder's gradient is computed in {EXACT}: the trial of {precision} failed"
                f" ({reason_of(error)}); runtime.decoder_precision chooses without a trial"
            )
            return EXACT
        return self._judged(where, precision, cosines)

    def _judged(self, where: str, precision: str, cosines: Tensor) -> str:
        chosen = precision if keeps_direction(cosines) else EXACT
        self._notices.add(
            f"{where}: the decoder's gradient is computed in {chosen}: {in_words(cosines, precision)};"
            " runtime.decoder_precision overrules it"
        )
        return chosen


def keeps_direction(cosines: Tensor) -> bool:
    """Whether gradients may guide, by cosines [2, n] to the exact ones: their own, and those of images in 8 bits.

    Few may be off, and none may be NaN.
    """
    if not cosines.shape[1]:
        return False
    low = cosines.quantile(LOW_QUANTILE, dim=1)
    cosine, (angle, angle_in_8_bits) = float(low[0]), degrees(low).tolist()
    is_as_near = angle <= MOST_TIMES_8_BITS * angle_in_8_bits
    return cosine >= LOWEST_COSINE and (cosine >= GOOD_COSINE or is_as_near)


def degrees(cosines: Tensor) -> Tensor:
    """Angles of cosines, which rounding may have put above 1."""
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))


def in_words(cosines: Tensor, precision: str) -> str:
    """Cosines [2, n] as the reason of a decision."""
    num_gradients = cosines.shape[1]
    if not num_gradients:
        return f"no gradient of the trial samples could be compared with {precision}'s"
    if lost := int((~cosines[0].isfinite()).sum()):
        return f"{lost} of {num_gradients} gradients were not finite in {precision}"
    low = cosines.quantile(LOW_QUANTILE, dim=1)
    (half, in_8_bits), (angle, angle_in_8_bits) = low.tolist(), degrees(low).tolist()
    return (
        f"in {precision}, 95 % of {num_gradients} gradients are within {angle:.1f} degrees of {EXACT}'s (cosine"
        f" {half:.4f}; median {float(cosines[0].median()):.4f}), and within {angle_in_8_bits:.1f} where the image is"
        f" rounded to the 8 bits in which it is stored (cosine {in_8_bits:.4f})"
    )
