"""Models that judge others must not be those others under another name. Imports no torch."""

from __future__ import annotations

from engine.errors import JobError
from engine.job.spec import ModelsSpec
from engine.models.addresses import locate
from engine.models.programs import as_file, is_program
from engine.models.weight_comparison import have_same_weights

_IMAGE_TOWER = ("vision_model.", "visual_projection.")


def check_independent(models: ModelsSpec) -> None:
    """Refuse models that are to judge others and are those others under another name.

    A judge with the images' half of the model that guided a sample measures what was guided on; an oracle with the
    weights of the target agrees with it, so that "failures that are still right" are none; a transfer model with these
    weights would show that every failure transfers. Files are compared, wherever they are here.

    Raises:
        JobError: all such pairs, a line each.
    """
    problems = []
    if models.judge and _are_same(models.judge, models.clip, _IMAGE_TOWER):
        problems.append(
            f"models.judge: '{models.judge}' has the weights of models.clip; the judge of a sample must be another CLIP"
            " model than the one that may have guided it"
        )
    if models.oracle and _are_same(models.oracle, models.target):
        problems.append(
            f"models.oracle: '{models.oracle}' has the weights of models.target; an oracle is to say whether the target"
            " errs: give another classifier"
        )
    problems += [
        f"models.transfer.{place}: '{address}' has the weights of models.target; give other classifiers, to which"
        " failures may transfer or not"
        for place, address in enumerate(models.transfer)
        if _are_same(address, models.target)
    ]
    if problems:
        raise JobError(problems)


def _are_same(address: str, other: str, part: tuple[str, ...] = ("",)) -> bool:
    places = [as_file(one) or (None if is_program(one) else locate(one).folder) for one in (address, other)]
    if address == other:
        return True
    first, second = places
    return first is not None and second is not None and have_same_weights(first, second, part)
