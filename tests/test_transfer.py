"""`riskforge study transfer`: its rows, its statistics on data whose truth is known, and a small real study."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import yaml

from engine.commands.experiments import StudyCall, call_study
from engine.data.run.outcomes import target_errs
from engine.data.run.study_document import read_study
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.models.weight_comparison import alike_share
from engine.studies.samples import open_study, read_attempts
from engine.studies.transfer.jobs import left_out_notes, row_job
from engine.studies.transfer.matrix import ERRORS, VALID, Aligned, cells_by_request, matrix_of
from engine.studies.transfer.names import named
from engine.studies.transfer.rows import Design, Row, design_of
from engine.studies.transfer.samples import RowSamples
from engine.studies.transfer.spec import TransferSpec
from tests.conftest import REPOSITORY

A, B, C = "zoo:digits/classifier", "zoo:digits/classifier-b", "zoo:digits/oracle-b"
ORACLE = "zoo:digits/oracle"
JOB = {
    "name": "tiny",
    "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": A, "oracle": ORACLE},
    "requests": [
        {"name": "risky", "method": "risky", "classes": ["three"], "count": 1, "accept": "is_error"},
        {"name": "plain", "method": "prompt", "classes": ["three"], "count": 1},
    ],
    "sampling": {"scheduler": "ddim", "num_inference_steps": 3},
    "guidance": {"risky": {"target_risk": 2.0}},
    "output": {"uri": "runs/tiny"},
}  # fmt: skip


def spec_of(**fields) -> TransferSpec:
    return TransferSpec.model_validate({"study": "transfer", "job": JOB, "count": 2, **fields})


def make_study(folder: Path, **fields) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({"study": "transfer", "job": JOB, "count": 2, **fields}, sort_keys=False))
    return file


def call_transfer(file: Path, output: Path | None = None, **changes) -> None:
    arguments = {
        "fields": {}, "executor": "local", "address": None, "validate": False, "sets": None, "as_json": False,
    } | changes  # fmt: skip
    call_study(StudyCall(kind="transfer", file=file, output=None if output is None else str(output), **arguments))


# Rows and their jobs.


def test_names_are_short_and_unique():
    addresses = ["zoo:digits/classifier", "zoo:cifar10/classifier", "models/Net.pt", "a.b:resnet20", "org/ViT-Base_16"]
    assert list(named(addresses)) == ["digits-classifier", "cifar10-classifier", "net", "resnet20", "vit-base-16"]
    assert list(named(["x/a", "x/a", "y" * 90])) == ["x-a", "x-a-2", "y" * 24]


def test_rows_are_unguided_then_single_targets_then_ensembles():
    job = parse_job(JOB)
    design = design_of(spec_of(targets=[A, B, C], evaluators={"other": ORACLE}), job)
    assert [row.title for row in design.rows] == [
        "unguided", "classifier", "classifier-b", "oracle-b", "all but classifier", "all but classifier-b",
        "all but oracle-b",
    ]  # fmt: skip
    assert list(design.classifiers) == ["classifier", "classifier-b", "oracle-b", "other"] and design.num_targets == 3
    assert design.rows[5].members == ("classifier", "oracle-b") and design.rows[5].left_out == "classifier-b"
    # The same ensemble asked for in two ways is one row.
    both = design_of(spec_of(targets=[A, B, C], ensembles=["leave-one-out", "oracle-b+classifier"]), job)
    assert len(both.rows) == 7
    # Two targets leave no ensemble, and without any the job's own are taken.
    assert len(design_of(spec_of(targets=[A, B]), job).rows) == 3
    alone = parse_job(JOB | {"models": JOB["models"] | {"transfer": [B]}})
    found = design_of(spec_of(), alone)
    assert list(found.classifiers) == ["classifier", "classifier-b"] and found.targets == ("classifier",)


def test_the_jobs_of_rows_differ_in_what_guides_alone():
    """All score all classifiers, from the same noise, without a rule that would choose samples by one of them."""
    job = parse_job(JOB)
    design = design_of(spec_of(targets=[A, B], ensembles="classifier+classifier-b", evaluators=[C]), job)
    unguided, first, second, both = (row_job(job, design, row, 5) for row in design.rows)
    for made in (unguided, first, second, both):
        [request] = made.requests
        assert (request.name, request.seed_group, request.count) == ("risky", "risky", 5)
        assert not request.accept and request.max_attempts is None and made.seed == job.seed
        assert {made.models.target, *made.models.further_targets, *made.models.transfer} == {A, B, C}
    assert [made.requests[0].method for made in (unguided, second)] == ["prompt", "risky"]
    assert (second.models.target, second.models.transfer) == (B, (A, C))
    assert (both.models.targets, both.models.transfer) == ((A, B), (C,))
    assert first.guidance_of(first.requests[0]).risky.target_risk == 2.0
    notes = left_out_notes(job)
    assert len(notes) == 2 and "1 unguided request" in notes[0] and "acceptance" in notes[1]


def test_the_worst_of_an_ensemble_and_an_oracle_that_guides_do_not_stop_the_other_rows():
    decoder = {"guidance_decoder": "zoo:digits/tiny-autoencoder"}
    raw = JOB | {
        "models": JOB["models"] | {"oracle": None, "oracles": [ORACLE, C]} | decoder,
        "guidance": {"risky": {"target_risk": 2.0, "oracle_floor": 0.9}, "ensemble": "worst"},
    }  # fmt: skip
    job = parse_job(raw | {"models": raw["models"] | {"target": [A, B]}})
    design = design_of(spec_of(targets=[A, B], ensembles="classifier+classifier-b"), job)
    unguided, first, _, both = (row_job(job, design, row, 2) for row in design.rows)
    assert both.guidance.ensemble == "worst" and first.guidance.ensemble == "mean"
    assert unguided.models.all_oracles == (ORACLE,) and first.models.all_oracles == (ORACLE, C)
    assert unguided.models.guidance_decoder is None and first.models.guidance_decoder


# What is refused before a worker starts.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": [A, A]}, "targets.digits-classifier-2: 'zoo:digits/classifier' is targets.digits-classifier"),
        ({"targets": {"a": A}, "evaluators": {"b": A}}, "evaluators.b: 'zoo:digits/classifier' is targets.a"),
        ({"targets": [A]}, "targets: there is one classifier"),
        ({"targets": []}, "targets: there is one classifier"),
        ({"targets": [A, B], "ensembles": "leave-one-out"}, "ensembles: leave-one-out of 2 leaves no ensemble"),
        ({"targets": [A, B], "ensembles": "classifier+clasifier-b"}, "did you mean 'classifier-b'?"),
        ({"targets": [A, B], "ensembles": "leave-one-ou"}, "did you mean 'leave-one-out'?"),
        ({"targets": [A, B], "ensembles": ["classifier+classifier"]}, "names a target twice"),
        ({"targets": [A, B], "ensembles": ["classifier"]}, "names one target"),
        ({"targets": [A, B], "ensembles": ["none", "classifier+classifier-b"]}, "names `none` and others"),
        (
            {"targets": [A, B], "evaluators": {"c": C}, "ensembles": "classifier+c"},
            "'c' is an evaluator, which guides nothing",
        ),
        ({"targets": {"unguided": A, "b": B}}, "targets.unguided: is the name of a row"),
        ({"targets": {"a": A, "b": B}, "evaluators": {"a": C}}, "evaluators.a: is the name of a target too"),
        ({"targets": {"x" * 60: A, "b": B}}, "choose a shorter name"),
        ({"targets": [A, "./missing"]}, "targets.missing: "),
        ({"targets": [A, B], "evaluators": ["./missing"]}, "evaluators.missing: "),
        ({"targets": [A, "zoo:digits/clip"]}, "targets.clip: "),
        ({"targets": [A, ORACLE]}, "models.oracle: 'zoo:digits/oracle' has the weights of models.target"),
        ({"targets": [A, "zoo:cifar10/classifier"]}, "has other classes than 'digits-classifier'"),
        ({"targets": [A, B], "evaluators": ["zoo:cifar10/classifier"]}, "evaluators.cifar10-classifier: "),
        ({"targets": [A, B], "label_map": {"c": {"x": "three"}}}, "label_map.c: is none of the classifiers"),
        ({"targets": [A, B], "label_map": {"classifier": 3}}, "label_map: of 'classifier': is not a mapping"),
        ({"targets": [A, B], "sets": {"gone": "nowhere/at/all"}}, "sets.gone: there is no 'nowhere/at/all'"),
        ({"targets": {"A b": A, "b": B}}, "targets.A b: "),
        ({"targets": 3}, "targets: "),
        ({"targets": [A, B], "count": 0}, "count: "),
        ({"targets": [A, B], "evaluater": [C]}, "evaluater: unknown key; did you mean 'evaluators'?"),
    ],
)  # fmt: skip
def test_wrong_studies_are_refused_by_field(tmp_path, fields, message):
    with pytest.raises(JobError) as error:
        call_transfer(make_study(tmp_path, **fields), tmp_path / "out", validate=True)
    assert any(message in line for line in error.value.problems), error.value.problems
    assert not (tmp_path / "out").exists()


def test_jobs_without_guidance_and_targets_of_another_order_are_refused(tmp_path):
    plain = JOB | {"requests": JOB["requests"][1:]}
    with pytest.raises(JobError, match="none is guided"):
        call_transfer(make_study(tmp_path, job=plain, targets=[A, B]), validate=True)
    folder = REPOSITORY / "engine/zoo/digits/classifier-b"
    shutil.copytree(folder, tmp_path / "turned")
    config = json.loads((tmp_path / "turned/config.json").read_text())
    names = list(config["id2label"].values())[::-1]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    (tmp_path / "turned/config.json").write_text(json.dumps(config))
    with pytest.raises(JobError, match="in another order"):
        call_transfer(make_study(tmp_path, targets={"a": A, "turned": str(tmp_path / "turned")}), validate=True)
    # As an evaluator it is read by its names; with the weights of another one it is refused all the same.
    call_transfer(make_study(tmp_path, targets=[A, C], evaluators={"b": str(tmp_path / "turned")}), validate=True)
    with pytest.raises(JobError, match=r"evaluators\.b: '.*turned' has the weights of targets\.classifier-b"):
        call_transfer(make_study(tmp_path, targets=[A, B], evaluators={"b": str(tmp_path / "turned")}), validate=True)


def test_an_evaluator_with_other_names_is_read_by_a_label_map(tmp_path):
    """By its name or its address, in the job of every row; wrong entries are refused by field."""
    folder = tmp_path / "renamed"
    shutil.copytree(REPOSITORY / "engine/zoo/digits/oracle-b", folder)
    config = json.loads((folder / "config.json").read_text())
    names = {index: f"digit {name}" for index, name in config["id2label"].items()}
    (folder / "config.json").write_text(
        json.dumps(config | {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}})
    )
    entries = {f"digit {name}": name for name in config["id2label"].values()}
    fields = {"targets": [A, B], "evaluators": {"renamed": str(folder)}}
    with pytest.raises(JobError, match=r"evaluators\.renamed: .* in label_map of the study"):
        call_transfer(make_study(tmp_path, **fields), validate=True)
    for key in ("renamed", str(folder)):
        call_transfer(make_study(tmp_path, label_map={key: entries}, **fields), validate=True)
    job = parse_job(JOB)
    design = design_of(spec_of(label_map={"renamed": entries}, **fields), job)
    for row in design.rows:
        assert row_job(job, design, row, 1).models.label_map == {str(folder): entries}
    with pytest.raises(JobError, match="label_map"):
        call_transfer(make_study(tmp_path, label_map={"renamed": {"digit one": "uno"}}, **fields), validate=True)


def test_options_override_the_file_and_name_classifiers(tmp_path, capsys):
    from engine.commands.transfer import _classifiers

    assert _classifiers("--target", [A, B]) == [A, B] and _classifiers("--target", None) is None
    assert _classifiers("--target", [f"a={A}", f"b={B}"]) == {"a": A, "b": B}
    assert _classifiers("--target", ["runs/x=1/model"]) == ["runs/x=1/model"]
    for wrong in ([f"a={A}", B], [f"a={A}", f"a={B}"]):
        with pytest.raises(JobError, match="--target: give each a name of its own"):
            _classifiers("--target", wrong)
    fields = {"targets": {"a": A, "b": B, "c": C}, "ensembles": ["a+c"], "count": 3}
    call_transfer(make_study(tmp_path, targets=[A]), validate=True, fields=fields)
    text = capsys.readouterr().out
    assert "5 runs of 3 samples: unguided, against 3 classifiers, against 1 ensemble; evaluated by 3" in text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("transfer-*.yaml")), ids=lambda path: path.stem)
def test_the_study_files_of_the_repository_are_valid(path, capsys):
    call_transfer(path, None, validate=True)
    assert "is valid: " in capsys.readouterr().out


# Weights that are alike.


def test_fine_tuned_weights_are_alike_and_those_of_others_are_not(tmp_path):
    import safetensors.numpy

    zoo = REPOSITORY / "engine/zoo"
    assert alike_share(zoo / "digits/classifier", zoo / "digits/classifier-b") == 0
    # Two networks of one architecture, trained apart.
    assert alike_share(zoo / "cifar10/classifier-b", zoo / "cifar10/oracle-b") < 0.02
    shutil.copytree(zoo / "digits/classifier", tmp_path / "tuned")
    [path] = (tmp_path / "tuned").glob("*.safetensors")
    rng = np.random.default_rng(0)
    tensors = safetensors.numpy.load_file(path)
    moved = {
        name: (one + 0.3 * one.astype("f4").std() * rng.standard_normal(one.shape)).astype(one.dtype)
        if one.dtype.kind == "f"
        else one
        for name, one in tensors.items()
    }
    safetensors.numpy.save_file(moved, path)
    assert alike_share(zoo / "digits/classifier", tmp_path / "tuned") == 1
    assert alike_share(path, tmp_path / "tuned") == 0


# Statistics on synthetic samples, whose truth is known.


def drawn(rng, num: int, shares: dict[str, tuple[float, ...]], agree: float = 1.0) -> list[RowSamples]:
    """Rows of N samples under classifiers that err with these probabilities, mostly on the same noises."""
    hard = rng.random((num, 1))
    samples = []
    for title, errors in shares.items():
        own = rng.random((num, len(errors)))
        # Uniform, so that the shares are exact; common to all rows and classifiers in six of ten.
        level = np.where(rng.random(own.shape) < 0.6, hard, own)
        samples.append(
            RowSamples(
                row=Row(
                    run=title.replace("+", "-"),
                    title=title,
                    members=() if title == "unguided" else tuple(title.split("+")),
                ),
                noise=tuple(("r", "p", seed) for seed in range(num)),
                errs=level < errors,
                risks=-np.log(level),
                agrees=(rng.random(num) < agree)[:, None],
            )
        )
    return samples


SHARES = {
    "unguided": (0.05, 0.05, 0.05), "a": (0.9, 0.3, 0.2), "b": (0.25, 0.9, 0.25), "c": (0.2, 0.3, 0.9),
    "a+b": (0.8, 0.8, 0.5),
}  # fmt: skip
JUDGES = {"a": (0,), "b": (0,), "c": (0,)}


def design_for(samples: list[RowSamples]) -> Design:
    return Design(classifiers={"a": "A", "b": "B", "c": "C"}, num_targets=3, rows=tuple(one.row for one in samples))


def test_intervals_of_means_hold_their_coverage():
    """Cells of one noise depend on each other; an interval that took them for independent would be far too narrow."""
    truths = {"diagonal": 0.9 - 0.25, "beyond": 0.25 - 0.05, "ensemble": 0.5 - 0.225}
    covered = dict.fromkeys(truths, 0)
    widths = []
    rng = np.random.default_rng(5)
    trials = 300
    for _ in range(trials):
        samples = drawn(rng, 60, SHARES)
        design = design_for(samples)
        aligned = Aligned.of(samples, design, JUDGES)
        found = {
            "diagonal": aligned.guided_and_others(ERRORS),
            "beyond": aligned.others_and_unguided(ERRORS),
            "ensemble": aligned.ensemble_and_singles(design.ensembles, ERRORS),
        }
        for name, one in found.items():
            covered[name] += one.difference.low <= truths[name] <= one.difference.high
        widths.append(found["beyond"].difference.high - found["beyond"].difference.low)
    for name, count in covered.items():
        assert 0.925 <= count / trials <= 0.98, (name, count / trials)
    # Six cells of 60 samples each, were they independent.
    assert np.mean(widths) > 1.3 * 2 * 1.96 * np.sqrt((0.25 * 0.75 + 0.05 * 0.95) / 360)


def test_nothing_is_found_where_there_is_nothing():
    """Without an effect of guidance on others, few families of cells are rejected; ensembles are as good as members."""
    shares = {"unguided": (0.2, 0.2, 0.2), "a": (0.9, 0.2, 0.2), "b": (0.2, 0.9, 0.2), "a+b": (0.9, 0.9, 0.2)}
    rng = np.random.default_rng(6)
    families = wrong = 0
    for trial in range(200):
        samples = drawn(rng, 60, shares)
        design = design_for(samples)
        wrong += Aligned.of(samples, design, JUDGES).ensemble_and_singles(design.ensembles, ERRORS).is_sure
        if trial < 10:
            cells = matrix_of(samples, design, JUDGES)
            families += any(cell.p_value < 0.05 for cell in cells if cell.p_value is not None and not cell.is_guided)
    assert families <= 1 and wrong <= 0.08 * 200


def test_cells_count_errors_valid_failures_and_what_is_carried():
    rng = np.random.default_rng(7)
    samples = drawn(rng, 1500, SHARES, agree=0.7)
    design = design_for(samples)
    cells = {(cell.row.title, cell.column): cell for cell in matrix_of(samples, design, JUDGES | {"c": ()})}
    assert cells["a", "a"].is_guided and not cells["a", "b"].is_guided and cells["a+b", "b"].is_guided
    for title, shares in SHARES.items():
        for column, share in zip("abc", shares, strict=True):
            assert abs(cells[title, column].errs.value - share) < 0.04
    assert abs(cells["a", "a"].valid.value - 0.63) < 0.04 and cells["a", "c"].valid is None
    assert abs(cells["a", "b"].more_errs.change.value - 0.25) < 0.04
    assert cells["unguided", "a"].p_value is None and cells["a", "b"].p_value < 1e-6
    # Hard noises fool both, so that of the failures of `a` more than `b`'s share carry over.
    failures = samples[1].errs[:, 0] & samples[1].agrees[:, 0]
    assert cells["a", "b"].carried.value == samples[1].errs[failures, 1].mean() and cells["a", "a"].carried is None
    both = samples[4].errs[:, :2].all(1) & samples[4].agrees[:, 0]
    assert cells["a+b", "c"].carried.value == samples[4].errs[both, 2].mean()
    aligned = Aligned.of(samples, design, JUDGES | {"c": ()})
    assert aligned.columns(VALID) == ("a", "b")
    # Valid failures of `b` on `a` alone, as `c` has no oracle of its own.
    assert aligned.ensemble_and_singles(design.ensembles, VALID) is None


def test_rows_are_compared_on_the_noises_that_they_share():
    rng = np.random.default_rng(8)
    samples = drawn(rng, 30, {"unguided": (0.1, 0.1, 0.1), "a": (0.9, 0.5, 0.5)})
    samples[1] = samples[1].take(list(range(29, 4, -1)))
    design = design_for(samples)
    aligned = Aligned.of(samples, design, JUDGES)
    assert [len(one) for one in aligned.samples] == [25, 25] and aligned.samples[0].noise == aligned.samples[1].noise
    cell = matrix_of(samples, design, JUDGES)[3]
    plain = samples[0].errs[5:, 0].mean()
    assert cell.num_samples == 25 and cell.more_errs.old == pytest.approx(plain)


def test_requests_are_pooled_and_shown_apart():
    rng = np.random.default_rng(9)
    samples = drawn(rng, 40, {"unguided": (0.1, 0.1, 0.1), "a": (0.9, 0.5, 0.5)})
    assert cells_by_request(samples, design_for(samples), JUDGES) == []
    for one in samples:
        object.__setattr__(one, "noise", tuple((f"r{seed % 2}", "p", seed) for _, _, seed in one.noise))
    found = cells_by_request(samples, design_for(samples), JUDGES)
    assert [(request, cell.row.title, cell.column, cell.num_samples) for request, cell in found[3:7]] == [
        ("r0", "a", "a", 20), ("r0", "a", "b", 20), ("r0", "a", "c", 20), ("r1", "unguided", "a", 20),
    ]  # fmt: skip
    assert found[3][1].errs.value == samples[1].errs[::2, 0].mean()


# A real study.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two sets of digits as class folders, one of them darker and with a class that the other lacks."""
    from engine.data.images import digits

    folder = tmp_path_factory.mktemp("sets")
    composites = digits.compose_split("test", 60, seed=0)
    for name, factor, classes in (("plain", 1.0, (3, 8)), ("dark", 0.3, (3, 8, 1))):
        for row in np.flatnonzero(np.isin(composites.labels, classes)).tolist():
            path = folder / name / digits.CLASS_NAMES[int(composites.labels[row])] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray((composites.images[row] * factor).astype(np.uint8)).save(path)
    (folder / "dark/unicorn").mkdir()
    PIL.Image.new("RGB", (32, 32)).save(folder / "dark/unicorn/0.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photographs):
    """A finished study of two targets and their ensemble."""
    folder = tmp_path_factory.mktemp("transfer")
    sets = {name: str(photographs / name) for name in ("plain", "dark")}
    file = make_study(folder, targets={"a": A, "b": B}, ensembles="a+b", sets=sets, evaluators={"judge": ORACLE})
    call_transfer(file, folder / "study")
    return folder / "study"


def test_a_study_ends_in_a_matrix_with_its_diagonal_marked(finished):
    table = pq.read_table(finished / "table.parquet").to_pylist()
    assert [(row["made_against"], row["evaluated_by"]) for row in table] == [
        (made, by) for made in ("unguided", "a", "b", "a + b") for by in ("a", "b", "judge")
    ]
    assert [row["guided"] for row in table] == [False] * 3 + [True, False, False, False, True, False, True, True, False]
    # The figures are those of the runs, by the target's own columns and by those of transfer models.
    for name, column in (("a", "a"), ("b", "b"), ("a-and-b", "a"), ("unguided", "a")):
        run = open_study(str(finished / "runs" / name))
        rows = list(
            read_attempts(run, ["risky"], ["key", "is_error", "predicted_class", "kldb_classes", "class_index"])
        )
        [found] = [
            row
            for row in table
            if row["made_against"].replace(" + ", "-and-") == name and row["evaluated_by"] == column
        ]
        assert found["errs"] == np.mean([target_errs(row) for row in rows]) and len(rows) == 2
    # Of the only oracle there are no valid failures to speak of.
    assert all((row["valid_failures"] is None) == (row["evaluated_by"] == "judge") for row in table)
    document = read_study(open_store(str(finished)))
    assert any("judge: is the only oracle itself" in note for note in document.notes)
    figure = (finished / "figure.svg").read_text()
    assert "valid failures" in figure and figure.count("#d55e00") >= 8


def test_rows_begin_with_the_same_noise(finished):
    seeds = {
        name: [row["seed"] for row in read_attempts(open_study(str(finished / "runs" / name)), ["risky"], ["seed"])]
        for name in ("unguided", "a", "b", "a-and-b")
    }
    assert len({tuple(one) for one in seeds.values()}) == 1 and len(seeds["a"]) == 2


def test_image_sets_are_compared_on_the_classes_that_they_share(finished, photographs):
    table = pq.read_table(finished / "sets.parquet").to_pylist()
    assert [(row["set"], row["classifier"]) for row in table][:4] == [
        ("plain", "a"), ("plain", "b"), ("plain", "judge"), ("dark", "a"),
    ]  # fmt: skip
    num = len(list((photographs / "plain").glob("*/*.png")))
    assert {row["images"] for row in table} == {num}
    assert all(row["accuracy"] <= row["accuracy_among"] for row in table)
    from engine.models.classifier import Classifier

    images = [(path.parent.name, PIL.Image.open(path)) for path in sorted((photographs / "dark").glob("[te]*/*.png"))]
    classifier = Classifier.load(B)
    predicted = classifier.score([image for _, image in images]).argmax(1).tolist()
    right = np.mean([classifier.labels[one] == name for one, (name, _) in zip(predicted, images, strict=True)])
    [found] = [row for row in table if (row["set"], row["classifier"]) == ("dark", "b")]
    assert found["accuracy"] == pytest.approx(right)
    notes = " ".join(read_study(open_store(str(finished))).notes)
    assert "classes that not all sets have are left out: one" in notes and "'unicorn' is not a class" in notes


def test_a_lost_file_is_written_again_without_scoring_again(finished, tmp_path, monkeypatch):
    home = tmp_path / "study"
    shutil.copytree(finished, home)
    (home / "sets.csv").unlink()
    arguments = read_study(open_store(str(finished))).arguments
    monkeypatch.setattr("engine.models.classifier.Classifier.load", None)
    fields = {name: arguments[name] for name in ("targets", "ensembles", "evaluators", "sets")}
    call_transfer(make_study(tmp_path, **fields), home)
    for name in ("sets.csv", "table.csv", "figure.svg", "risks.parquet"):
        assert (home / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_in_the_same_table(finished, photographs, tmp_path):
    fields = {
        "targets": {"a": A, "b": B}, "ensembles": "a+b", "evaluators": {"judge": ORACLE},
        "sets": {name: str(photographs / name) for name in ("plain", "dark")},
    }  # fmt: skip
    file, home = make_study(tmp_path, **fields), tmp_path / "study"
    command = [str(Path(sys.executable).with_name("riskforge")), "study", "transfer", str(file), "--executor", "local"]
    process = subprocess.Popen([*command, "--output", str(home)], stdout=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 400
    while not (home / "runs/unguided/_SUCCESS").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (home / "runs/unguided/metadata.parquet").stat().st_mtime_ns
    assert not (home / "table.csv").exists()
    call_transfer(file, home)
    assert (home / "runs/unguided/metadata.parquet").stat().st_mtime_ns == first
    for name in ("table.csv", "differences.csv", "risks.csv", "sets.csv", "figure.svg"):
        assert (home / name).read_bytes() == (finished / name).read_bytes()
