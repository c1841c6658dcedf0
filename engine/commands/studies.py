"""Commands that study a finished run: retraining of its target, evaluation of its images."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.commands.arguments import JsonOption, RunArgument
from engine.commands.output import make_console, make_display, print_json, print_some
from engine.commands.stopping import NOTHING_STORED, stop_on_signals
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.studies.retrain.results import Retrained


RealOption = Annotated[
    str,
    typer.Option(
        metavar="DATA", help="Labelled images to train on; the same forms as `prepare --data`.", show_default=False
    ),
]
TestOption = Annotated[
    str, typer.Option(metavar="DATA", help="Labelled images to test on; contexts are compared.", show_default=False)
]
PlainOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REQUEST",
        help="Requests of the plain baseline; repeatable. Default: prompt-only requests without an `accept` rule.",
    ),
]
RiskyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REQUEST",
        help="Requests whose samples are added; repeatable. Default: requests with an `accept` rule.",
    ),
]
LabelsOption = Annotated[
    Literal["hard", "soft"], typer.Option(help="Labels of generated samples: their class, or their soft label.")
]
ArmOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="What to compare with real images alone: plain, unfiltered (or random), accepted, entropy, augment, pgd;"
        " repeatable; accepted:30 for 30 samples. Default: plain, unfiltered, accepted.",
    ),
]
ProtectOption = Annotated[
    Literal["none", "distill", "average", "arithmetic"],
    typer.Option(help="Keep what the target could: distillation, or arithmetic with old and new weights."),
]
ProtectWeightOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Of --protect: weight of the added loss, or of the new weights. Default: one found on digits.",
        show_default=False,
    ),
]
FlipOption = Annotated[
    bool, typer.Option("--flip", help="Arm augment: mirror half of the images. Not where that makes another class.")
]
HeldOutOption = Annotated[
    float,
    typer.Option(
        metavar="X", help="Share of the accepted samples that is not trained on but tested; 0 switches it off."
    ),
]
CalibrateOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Labelled images unseen by the target, to fit the temperature. Default: keep the target's.",
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        metavar="URI", help="Folder or address for figures and model. Default: RUN-retrained, next to the run."
    ),
]


def retrain(
    run: RunArgument,
    real: RealOption,
    test: TestOption,
    plain: PlainOption = None,
    risky: RiskyOption = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Training runs per arm.")] = 5,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of each training run.")] = 200,
    mix: Annotated[float, typer.Option(metavar="X", help="Share of generated images in a batch.")] = 0.2,
    labels: LabelsOption = "hard",
    held_out: HeldOutOption = 0.2,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images per batch.")] = 64,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="Peak learning rate of AdamW.")] = 3e-4,
    calibrate: CalibrateOption = None,
    arm: ArmOption = None,
    protect: ProtectOption = "none",
    protect_weight: ProtectWeightOption = None,
    flip: FlipOption = False,
    pgd_eps: Annotated[float, typer.Option(metavar="X", help="Arm pgd: largest change of a pixel in 0..1.")] = 8 / 255,
    pgd_steps: Annotated[int, typer.Option(metavar="N", help="Arm pgd: steps of each attack.")] = 3,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a run's target on its samples; compare with the original and with training on plain samples."""
    from engine.commands.jobfile import let_import_of_run
    from engine.studies.retrain.arm_records import DEFAULT_ARMS
    from engine.studies.retrain.options import RetrainOptions
    from engine.studies.retrain.program import retrain as retrain_target
    from engine.studies.samples import open_study

    options = RetrainOptions(
        real=real,
        test=test,
        calibrate=calibrate,
        plain=tuple(plain or ()),
        risky=tuple(risky or ()),
        num_seeds=seeds,
        num_steps=steps,
        mix=mix,
        labels=labels,
        batch_size=batch_size,
        learning_rate=learning_rate,
        held_out=held_out,
        protect=protect,
        protect_weight=protect_weight,
        flips=flip,
        pgd_eps=pgd_eps,
        pgd_steps=pgd_steps,
        arms=tuple(arm or DEFAULT_ARMS),
    )
    with stop_on_signals(NOTHING_STORED):
        let_import_of_run(run, open_study(run).job)
        retrained = retrain_target(run, options, display=make_display(), folder=output)
    if as_json:
        print_json(retrained.document)
    else:
        _print_retrained(retrained)


EvaluateRealOption = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Real labelled images to compare with; the same forms as `prepare --data`."),
]
TrainOption = Annotated[
    str | None, typer.Option(metavar="DATA", help="Training images of the diffusion model, to search for copies.")
]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="REQUEST", help="Request to compare the other requests with.")
]
ClipOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="CLIP model that embeds the images. Default: the job's.")
]
FeaturesOption = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="Feature space of distances: clip, inception, auto (Inception if its weights are on this machine), or the"
        " address of a DINOv2, SigLIP or CLIP model.",
    ),
]
InceptionOption = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="File or folder of inception-2015-12-05.pt. Default: search TORCH_HOME."),
]
FailuresOption = Annotated[
    Literal["accepted", "all"],
    typer.Option(help="Failures to cluster: accepted ones only, or rejected ones too."),
]
EvaluateOutputOption = Annotated[
    str | None,
    typer.Option(metavar="URI", help="Folder or address for evaluation.json and the report. Default: the run."),
]


def evaluate(
    run: RunArgument,
    real: EvaluateRealOption = None,
    train: TrainOption = None,
    reference: ReferenceOption = None,
    clip: ClipOption = None,
    features: FeaturesOption = "auto",
    inception: InceptionOption = None,
    failures: FailuresOption = "accepted",
    limit: Annotated[int, typer.Option(metavar="N", help="Maximum number of images to read per request.")] = 2000,
    output: EvaluateOutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a run's images with real images, training images and prompts; cluster its failures in the report."""
    from engine.commands.jobfile import let_import_of_run
    from engine.studies.evaluate.options import EvaluateOptions
    from engine.studies.evaluate.program import evaluate as evaluate_run
    from engine.studies.evaluate.summary_lines import summary_lines
    from engine.studies.samples import open_study

    options = EvaluateOptions(
        real=real, train=train, reference=reference, clip=clip, features=features, inception=inception,
        failures=failures, limit=limit,
    )  # fmt: skip
    with stop_on_signals(NOTHING_STORED):
        let_import_of_run(run, open_study(run).job)
        with contextlib.closing(make_display()) as display:
            evaluated = evaluate_run(run, options, display=display, folder=output)
    if as_json:
        print_json(evaluated.evaluation.model_dump(mode="json", exclude={"images"}))
        return
    for line in summary_lines(evaluated.evaluation):
        print(line)
    print(f"figures: {evaluated.document}")
    if evaluated.twins:
        print(f"twins: {evaluated.twins} (unguided twins of samples: {evaluated.num_twins})")
    print(f"report: {evaluated.report}")


def _print_retrained(retrained: Retrained) -> None:
    """Print tables by context, findings, the data trained on, and the paths of the results."""
    from engine.commands.comparison import print_rescored
    from engine.studies.retrain.arm_records import PROTECT_NOTHING
    from engine.studies.retrain.inputs import DOCUMENT, MODEL
    from engine.studies.retrain.tables import accuracy_table, agreement_table, change_table

    document, console = retrained.document, make_console()
    console.print(accuracy_table(retrained.comparison, retrained.arms.main))
    if retrained.comparison.contexts:
        console.print(change_table(retrained.comparison))
    if retrained.agreement.rows:
        console.print(agreement_table(retrained.agreement))
    for finding in retrained.findings:
        print(finding)
    print()
    print("All samples of the run again, those that it was trained on among them:")
    print_rescored(retrained.rescored, has_groups=False)
    print()
    for line in _sample_lines(retrained.arms.counts):
        print(f"generated    {line}")
    protection = document["protection"]
    if protection["kind"] != PROTECT_NOTHING:
        print(f"protection   {protection['kind']}, weight {protection['strength']:g}, in every arm")
    print(f"held out     {len(retrained.arms.held_out)} accepted samples, by start and seed")
    for arm, reason in retrained.arms.left_out.items():
        print(f"left out     {arm}: {reason}")
    for name, data in document["data"].items():
        print(f"{name:<13}{data['images']} images from {data['kind']}, {data['num_unusable']} unusable")
        print_some([f"{image['name']}: {image['reason']}" for image in data["unusable"]], "retrain.json")
    temperature = document["temperature"]
    origin = "fitted on --calibrate" if temperature["fit"] else "the target's; --calibrate DATA fits it"
    print(f"temperature  {temperature['used']:.4g}, {origin}")
    print(f"model        {retrained.store.address(MODEL)}")
    print(f"figures      {retrained.store.address(DOCUMENT)}")


def _sample_lines(counts: dict[str, int]) -> list[str]:
    """How many generated samples the arms have, those with equally many in a line."""
    numbers = dict.fromkeys(counts.values())
    arms = {number: ", ".join(arm for arm, count in counts.items() if count == number) for number in numbers}
    return [f"{number} samples in each of {names}" for number, names in arms.items()]
