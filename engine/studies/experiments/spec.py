"""Fields that all study files have. `engine.studies.experiments.parsing` checks a file against a study's own fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import pydantic
from pydantic import Field, StrictInt

from engine.job.spec import Address, Name, Seed
from engine.methods.fields import Spec

DEFAULT_COUNT = 24
MAX_COUNT = 1_000_000
if TYPE_CHECKING:
    JobMapping = dict[str, Any]
else:
    JobMapping = dict[str, pydantic.JsonValue]


class StudyOutput(Spec):
    """Where the study is stored."""

    uri: Annotated[str, Field(min_length=1, max_length=2000)] = Field(description="Folder of the study.")


class StudySpec(Spec):
    """Fields of every study."""

    study: str = Field(description="The study that the file is for.")
    name: Name | None = Field(
        default=None, max_length=40, description="Prefix of the names of its runs; default: the job's name."
    )
    job: JobMapping | Address = Field(
        description="The job whose fields are varied: inline, or the path of its file, from the working folder or next"
        " to this file."
    )
    seed: Seed | None = Field(default=None, description="Of the samples; default: the job's.")
    count: StrictInt = Field(
        default=DEFAULT_COUNT, ge=1, le=MAX_COUNT, description="Samples of a cell of the table; 500 in the papers."
    )
    output: StudyOutput | None = Field(
        default=None, description="Where the study is stored; default: next to the job's output, with the study's name."
    )

    @property
    def models(self) -> tuple[str, ...]:
        """Addresses of models that the study names besides its job's; factories among them are imported."""
        return ()
