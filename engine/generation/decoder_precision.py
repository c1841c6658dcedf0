"""The precision in which guidance differentiates a decoder: half where its gradients keep their direction.

Half precision halves the memory of the decoder's graph and doubles the speed of what is nearly all of guidance's cost.
Which direction survives depends on decoder, pipeline and criterion, so that it is measured for each of them, with
samples that do not depend on the batch: workers on equal GPUs decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from engine.errors import JobError
from engine.generation.faults import is_fault_of_machine, release
from engine.generation.notices import Notices
from engine.methods.guidance.scene import Decoding
from engine.models.decoder_checks import FLOAT16_OVERFLOWS
from engine.models.decoding import EXACT, Decoder
from engine.models.factories import reason_of
from engine.models.hardware import Hardware

# Samples of a trial, from the noise of the request's first ones.
TRIAL_SAMPLES = 2
# Of 20 gradients, one may be off by more than 8 degrees.
LOWEST_COSINE = 0.99
LOW_QUANTILE = 0.05

# Gives the cosines [n] of a request's gradients with a decoding to those in float32.
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
    """Whether gradients with these cosines [n] to the exact ones may guide: few are off, and none is NaN."""
    return len(cosines) > 0 and float(cosines.quantile(LOW_QUANTILE)) >= LOWEST_COSINE


def in_words(cosines: Tensor, precision: str) -> str:
    """Cosines [n] as the reason of a decision."""
    if not len(cosines):
        return f"no gradient of the trial samples could be compared with {precision}'s"
    finite = cosines[cosines.isfinite()]
    if lost := len(cosines) - len(finite):
        return f"{lost} of {len(cosines)} gradients were not finite in {precision}"
    return (
        f"the cosine of {precision}'s with {EXACT}'s is {float(finite.median()):.4f} (median of {len(finite)}; 5 % are"
        f" below {float(finite.quantile(LOW_QUANTILE)):.4f})"
    )
