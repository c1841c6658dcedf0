"""The data set's card: README.md with the YAML header that the Hugging Face Hub and `datasets` read."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import yaml

from engine.data.run.card_loading import loading_section
from engine.data.run.curated import curation_of
from engine.data.run.curation_text import curation_facts
from engine.data.run.file_names import SURPLUS_LIST
from engine.data.run.run_warnings import known_warnings
from engine.data.run.schema import arrow_schema, tar_features
from engine.data.run.summary import GroupSummary, Spread, plain_first, shown_entry_scores, shown_scores
from engine.job.columns import (
    BY_NAME,
    GUIDES,
    MIN_ORACLE_P_LABEL,
    MIN_P_VALID,
    Role,
    columns_with,
    enumerated,
    target_first,
    units_text,
)
from engine.job.records import STARTS, TWINS
from engine.job.spec import CLASS_TEMPLATE, ConditioningSpec, JobSpec, RequestSpec
from engine.models.calibration import NOTED, model_notes
from engine.models.licences import UNKNOWN

# What the name `label_is_valid` stands for.
_BY_ORACLES = f"every oracle that guided nothing has the label at p >= {MIN_ORACLE_P_LABEL}"
_VALIDITY_RULE = f"`p_valid` is {MIN_P_VALID} or more, or, without that estimate, {_BY_ORACLES}"
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
# Headings that the note above the table explains.
ERRORS, VALID_FAILURES, STRICT_FAILURES = "errors", "valid failures", "strictly valid failures"
MAX_TABLE_ROWS = 200
_COMPANION_TEXTS = {
    STARTS: "the real image that a sample started from, at the size of the sample, not scored",
    TWINS: "the unguided twin of a sample, from the same noise, prompt and start, with scores of its own",
}
MAX_SHORT = 8
MAX_CONTEXTS = 30
# Of the description of a model, what is not listed as it is.
_APART = ("labels", *NOTED)


def dataset_card(job: JobSpec, manifest: dict[str, Any], groups: list[GroupSummary], data_files: list[str]) -> str:
    """The card as text.

    Args:
        manifest: as from `build_manifest`.
        data_files: patterns of the tars, relative to the data set.
    """
    sections = [
        _header(job, manifest, data_files),
        f"# {job.name}",
        _origin(job, manifest),
        _models(manifest["models"]),
        "\n".join(["## How it was made", "", *request_lines(job, manifest["counts"])]),
        *_curation(manifest),
        _table(groups),
        loading_section(job.output.image_format, manifest["schema_version"]),
        *_companions(manifest),
        columns_section(
            manifest["schema_version"], has_ensemble=bool(job.models.further_targets), oracle_guides=job.oracle_guides
        ),
        _limits(job, manifest["schema_version"]),
    ]
    return "\n\n".join(sections) + "\n"


def _header(job: JobSpec, manifest: dict[str, Any], data_files: list[str]) -> str:
    methods = sorted({f"guidance-{request.method_record.name}" for request in job.requests})
    header = {
        "pretty_name": job.name,
        "license": "other",
        "license_name": "unknown",
        "task_categories": ["image-classification"],
        "annotations_creators": ["machine-generated"],
        "source_datasets": ["original"],
        "tags": ["synthetic", "riskforge", "webdataset", "hard-examples", *methods],
        "size_categories": [size_category(_num_stored(job, manifest["counts"]["samples"]))],
        "configs": [card_config(data_files, f"{manifest['plan_digest']} {manifest['counts']['samples']}")],
        "dataset_info": {"features": _features(job, manifest)},
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _features(job: JobSpec, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    labels = manifest["models"].get("target", {}).get("labels") or ()
    return tar_features(job.output.image_format, manifest["schema_version"], labels)


def card_config(data_files: list[str], content: str) -> dict[str, Any]:
    """The only configuration of a data set: one split.

    `datasets` keeps what it has read of a path by the version, and would give it again after the files have changed.

    Args:
        content: differs where the data differ.
    """
    version = int(hashlib.sha256(content.encode()).hexdigest()[:8], 16)
    files = [{"split": "train", "path": data_files}]
    return {"config_name": "default", "version": f"0.0.{version}", "data_files": files}


def _num_stored(job: JobSpec, samples: dict[str, int]) -> int:
    """Images in the tars: those of rejected samples too, where the job stores them."""
    return samples["ok"] + (samples["rejected"] if job.output.store_rejected else 0)


def size_category(num_images: int) -> str:
    """How the Hub calls a data set of so many images."""
    return next((name for limit, name in _SIZES if num_images < limit), "n>1T")


def _origin(job: JobSpec, manifest: dict[str, Any]) -> str:
    samples, shards = manifest["counts"]["samples"], manifest["counts"]["shards"]
    return (
        f"**Every image{_where_synthetic(manifest)} is synthetic**: sampled from a text-to-image diffusion model by "
        f"Riskforge to find where an image classifier, the target, errs or hesitates. {_photographs(manifest)}"
        f"{_provenance(job, manifest)}\n\n"
        f"{samples['ok']} images in {shards['committed']} shards, of {samples['attempted']} attempts "
        f"({samples['rejected']} rejected, {samples['failed']} failed, {samples['accepted']} accepted). "
        f"Seed {job.seed}; plan `{manifest['plan_digest']}`.{_state(manifest)}\n\n"
        f"{_warnings(manifest)}{_not_counted(job, manifest['counts'])}"
        f"**Licence:** not stated by the engine. It follows from the licences of the models below, above all of the "
        f"diffusion model; set `license` in the header once it is known. {_licences(manifest['models'])}"
    )


def _where_synthetic(manifest: dict[str, Any]) -> str:
    return f" but those in `{STARTS}/`" if _has_starts(manifest) else ""


def _has_starts(manifest: dict[str, Any]) -> bool:
    return STARTS in manifest.get("companions", {})


def _photographs(manifest: dict[str, Any]) -> str:
    if not _has_starts(manifest):
        return "No image is a photograph."
    return (
        f"The images in `{STARTS}/` are real ones, which samples started from: what their owners allow holds for them,"
        " and for the samples that show them."
    )


def _provenance(job: JobSpec, manifest: dict[str, Any]) -> str:
    if not job.output.provenance:
        return ""
    which = "other file" if _has_starts(manifest) else "file"
    return (
        f" Every {which} says so itself: its XMP has IPTC's `DigitalSourceType` "
        "[`trainedAlgorithmicMedia`](http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia)."
    )


def _state(manifest: dict[str, Any]) -> str:
    """What is missing: shards, rounds of quotas, or accepted samples that no further round would be made for."""
    shards, missing = manifest["counts"]["shards"], _num_of_quotas(manifest["counts"], "missing")
    if manifest["complete"]:
        short = f"{missing} accepted samples that the quotas ask for were not reached within the attempts allowed"
        return f"\n\n**Short:** {short}." if missing else ""
    if shards["committed"] < shards["planned"]:
        there = f"{shards['committed']} of {shards['planned']} shards were there when this was written"
    else:
        there = f"the quotas lacked {missing} accepted samples when this was written, and asked for more shards"
    return f"\n\n**Not complete:** {there}."


def _num_of_quotas(counts: dict[str, Any], name: str) -> int:
    return sum(row[name] for rows in counts.get("quotas", {}).values() for row in rows)


def _warnings(manifest: dict[str, Any]) -> str:
    """Requests without a sample that is what was asked for."""
    return "".join(f"**Warning:** {code(line, table=False)}\n\n" for line in known_warnings(manifest))


def _not_counted(job: JobSpec, counts: dict[str, Any]) -> str:
    """The images in the tars that are none of those asked for."""
    rejected = counts["samples"]["rejected"] if job.output.store_rejected else 0
    surplus = _num_of_quotas(counts, "surplus")
    text = ""
    if rejected:
        text += (
            f"**The {rejected} rejected images are stored too.** Their label may be wrong: keep the samples whose JSON"
            " says `accepted: true`, unless you want to study the others.\n\n"
        )
    if surplus:
        text += (
            f"**The tars hold {surplus} accepted images beyond the quotas.** `{SURPLUS_LIST}` lists their keys, and"
            " `surplus` in `metadata.parquet` marks them.\n\n"
        )
    return text + ("The lines under Loading leave them out.\n\n" if text else "")


def _licences(models: dict[str, Any]) -> str:
    described = [model for value in models.values() for model in each(value)]
    stated = [model for model in described if isinstance(model, dict) and model.get("license") not in (None, UNKNOWN)]
    if not stated:
        return "The files of the models state none."
    return "Of the models' licences only what their own files say is listed."


def _models(models: dict[str, Any]) -> str:
    lines = ["## Models", "", "| role | model |", "|---|---|"]
    for role, value in models.items():
        lines += [f"| {role} | {model_text(model)} |" for model in each(value)]
    return "\n".join(lines)


def each(value: Any) -> list[Any] | tuple[Any, ...]:
    """The models of a role, which has one or several."""
    return value if isinstance(value, list | tuple) else [value]


def model_text(model: Any) -> str:
    """A described model in a cell of a table."""
    if not isinstance(model, dict):
        return code(str(model))
    facts = [(name, value) for name, value in model.items() if name not in _APART]
    text = ", ".join(name if value is True else f"{name} {code(str(value))}" for name, value in facts)
    return "; ".join([text, *map(code, model_notes(model))])


def _amount(request: RequestSpec) -> str:
    if not request.has_quota:
        return f"{request.count} for each class or subset and context"
    return (
        f"{request.num_wanted} accepted ones for each class or subset, from at most {request.attempts_limit} attempts"
    )


def request_lines(job: JobSpec, counts: dict[str, Any]) -> list[str]:
    """What was asked for, and below each request its outcome.

    Args:
        counts: those of the run's manifest; what they lack is not told.
    """
    lines = []
    for request in job.requests:
        wanted = request.boundary if request.boundary is not None else request.classes
        classes = "all classes" if wanted == "all" else ", ".join(code(str(name), table=False) for name in wanted or ())
        joint = " jointly" if request.boundary is not None else ""
        lines += [
            f"- **{request.name}**: method `{request.method}`, {request.method_record.caption}; {classes}{joint}, "
            f"{_amount(request)}; contexts: {len(request.contexts)}.",
            *_outcome(request, counts),
            f"  - prompt: {code(request.prompt or _default_prompt(request), table=False)}",
            *_contexts(request),
            f"  - sampling: {_parameters(job.sampling_of(request).model_dump())}",
        ]
        if request.fresh:
            lines.append(f"  - fresh: the seeds are those of {code(str(request.fresh), table=False)} alone")
        if request.conditioning:
            screening = counts.get("screening", {}).get(request.name, [])
            lines.append(f"  - conditioning: {_conditioning(request.conditioning, screening)}")
        if request.start:
            lines.append(f"  - start: {_parameters(request.start.model_dump())}")
        if request.method_record.is_guided and request.steps_taken(job.sampling_of(request).num_inference_steps):
            lines += [
                f"  - guidance: {_parameters(job.parameters_of(request).in_effect())}",
                *_ensemble(job, request),
                f"  - guided: {_guided(counts.get('guidance', {}).get(request.name))}",
            ]
        if request.accept:
            rule = request.accept
            text = code(rule, table=False) if isinstance(rule, str) else _parameters(rule)
            lines.append(f"  - accepted when: {text}")
        else:
            lines.append("  - accepted: every one, without a rule")
    return lines


def _outcome(request: RequestSpec, counts: dict[str, Any]) -> list[str]:
    if not counts.get("requests"):
        return []
    made = _made(counts["requests"].get(request.name, {}), counts.get("quotas", {}).get(request.name))
    return [f"  - made: {made}"]


def _default_prompt(request: RequestSpec) -> str:
    return "{class} and {class}" if request.boundary is not None else CLASS_TEMPLATE


def _contexts(request: RequestSpec) -> list[str]:
    """The texts that follow the prompt; nothing where there is none but the empty one."""
    if request.contexts == ("",):
        return []
    shown = [code(context, table=False) if context else "none" for context in request.contexts[:MAX_CONTEXTS]]
    if len(request.contexts) > MAX_CONTEXTS:
        shown.append(f"and {len(request.contexts) - MAX_CONTEXTS} more")
    return [f"  - contexts, after the prompt: {', '.join(shown)}"]


def _ensemble(job: JobSpec, request: RequestSpec) -> list[str]:
    """The targets that guidance saw; nothing where there is one."""
    if not job.models.further_targets:
        return []
    targets = ", ".join(code(target, table=False) for target in job.models.targets)
    which = "the mean" if job.guidance_of(request).ensemble == "mean" else "the largest"
    return [f"  - ensemble: {which} of each sample's distances under {targets}; the scores are those of the first"]


def _curation(manifest: dict[str, Any]) -> list[str]:
    """Of a curated run where it comes from and what selected it; nothing of any other."""
    curation = curation_of(manifest)
    if curation is None:
        return []
    lines = [
        "## Curation",
        "",
        "**These images were selected from another run**: of each group of candidates one, at random, the likelier the"
        " higher its reward. The other attempts are in `metadata.parquet` as `rejected`, without image.",
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {name} | {code(text)} |" for name, text in curation_facts(curation)),
    ]
    return ["\n".join(lines)]


def _companions(manifest: dict[str, Any]) -> list[str]:
    """Of a run with second images of its samples where they are; nothing of any other."""
    found = manifest.get("companions")
    if not found:
        return []
    lines = [
        "### Second images",
        "",
        "Their keys are those of the samples, and their tars are read by the same lines:",
        "",
        *(
            f"- `{kind}/*.tar`: {_COMPANION_TEXTS[kind]} ({entry['images']} images in {entry['tars']} tars)"
            for kind, entry in found.items()
        ),
    ]
    return ["\n".join(lines)]


def _made(made: dict[str, int], quotas: list[dict[str, Any]] | None) -> str:
    """The outcome of a request, in numbers."""
    if not made.get("attempted"):
        return "nothing so far"
    text = f"{made['attempted']} attempts: " + ", ".join(
        f"{made[name]} {name}" for name in ("ok", "rejected", "failed")
    )
    short = [f"{quota['missing']} of {code(quota['class'], table=False)}" for quota in quotas or () if quota["missing"]]
    if not short:
        return text
    more = f" and {len(short) - MAX_SHORT} more classes" if len(short) > MAX_SHORT else ""
    return f"{text}; short of its quota by {', '.join(short[:MAX_SHORT])}{more}"


def _guided(counts: dict[str, int] | None) -> str:
    """How many images guidance reached."""
    if counts is None:
        return "no image so far"
    text = f"{counts['guided']} of {counts['scored']} scored images"
    if counts["without_effect"]:
        text += f"; of these {counts['without_effect']} as without it: no gradient was finite and other than zero"
    return text


def _conditioning(spec: ConditioningSpec, screening: list[dict[str, Any]]) -> str:
    """What the embeddings of a request were, with the parameters that had an effect.

    Args:
        screening: by class, samples and draws, and how many samples had a draw that passed.
    """
    if spec.images is not None:
        return f"embeddings of given images, {_parameters({'images': spec.images, 'noise_level': spec.noise_level})}"
    kept: dict[str, Any] = {"artefact": spec.artefact, "noise_level": spec.noise_level}
    if not spec.is_screened:
        return f"embeddings drawn from class statistics, not screened, {_parameters(kept)}"
    kept |= {"threshold": spec.threshold, "max_draws": spec.max_draws}
    asked = (
        "embeddings drawn from class statistics, each to be drawn until the target's error predictor expects an error"
    )
    return f"{asked}, {_parameters(kept)}; {_screened(screening)}"


def _screened(screening: list[dict[str, Any]]) -> str:
    """The outcome of the draws."""
    samples, screened, draws = (sum(counts[name] for counts in screening) for name in ("samples", "screened", "draws"))
    if not samples:
        return "nothing was drawn so far"
    text = f"{screened} of {samples} samples have an embedding that passed, in {draws} draws"
    if screened == samples:
        return text
    which = "all" if not screened else f"the other {samples - screened}"
    return f"{text}; {which} were made from the likeliest of their draws and are not screened (`screened: false`)"


def _parameters(values: dict[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if value not in (None, "")}
    return ", ".join(f"{name} {code(str(value), table=False)}" for name, value in shown.items())


def _table(groups: list[GroupSummary]) -> str:
    columns = _columns(groups)
    lines = [
        "## Scores",
        "",
        _table_note(groups),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    lines += [
        f"| {' | '.join(cell(group) for cell in columns.values())} |" for group in plain_first(groups)[:MAX_TABLE_ROWS]
    ]
    if len(groups) > MAX_TABLE_ROWS:
        lines += ["", f"{len(groups) - MAX_TABLE_ROWS} more rows are under `summary` in `manifest.json`."]
    return "\n".join(lines)


def _columns(groups: list[GroupSummary]) -> dict[str, Callable[[GroupSummary], str]]:
    """Headings and the cells below them; models that a job does not name have no column."""
    columns: dict[str, Callable[[GroupSummary], str]] = {
        "request": lambda group: group.request,
        "context": lambda group: code(group.context) if group.context else "none",
        "images / attempts": lambda group: f"{group.ok} / {group.attempted}",
        ERRORS: lambda group: _percent(group.error_rate),
    }
    for column in target_first(shown_scores(groups)):
        columns[column.label] = functools.partial(_score_cell, column.name)
    if _has_oracle(groups):
        columns["oracle agrees"] = lambda group: _percent(group.oracle_agreement)
        columns[VALID_FAILURES] = lambda group: _percent(group.valid_failure_rate)
    if any(group.strict_failure_rate is not None for group in groups):
        columns[STRICT_FAILURES] = lambda group: _percent(group.strict_failure_rate)
    if any(group.transfer for group in groups):
        columns["transfer"] = _transfer
    for name, entry in shown_entry_scores(groups).items():
        columns[entry.heading] = functools.partial(_mean_cell, name)
    return columns


def _score_cell(name: str, group: GroupSummary) -> str:
    return _spread(group.scores.get(name))


def _mean_cell(name: str, group: GroupSummary) -> str:
    return _number(group.entry_means.get(name))


def _has_oracle(groups: list[GroupSummary]) -> bool:
    return any(group.oracle_agreement is not None for group in groups)


def _table_note(groups: list[GroupSummary]) -> str:
    units = units_text(target_first(shown_scores(groups)), is_full=True)
    text = (
        "Medians per request and context, over all scored samples, rejected ones too; in brackets the middle half. "
        f"{units[:1].upper()}{units[1:]}. Errors: the target predicts another class than the conditioned one, for a "
        "joint prompt one outside its classes."
    )
    if _has_oracle(groups):
        text += (
            " The oracle agrees where it predicts a class that was asked for; a valid failure is a sample on which the "
            "target errs while the oracle agrees."
        )
    if any(group.strict_failure_rate is not None for group in groups):
        text += f" It is strictly valid where {_VALIDITY_RULE}."
    if shown_entry_scores(groups):
        text += " The judge is a second CLIP model that guided nothing; its conformity is a mean."
    if any(summary.model.endswith(GUIDES) for group in groups for summary in group.transfer):
        text += f" A classifier with `{GUIDES.strip()}` guided beside the target: its figures show no transfer."
    return text


def _transfer(group: GroupSummary) -> str:
    return "; ".join(
        f"{code(summary.model)} errors {_percent(summary.error_rate)}, risk {summary.risk_median:.3g}"
        for summary in group.transfer
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3g} ({spread.q25:.3g} to {spread.q75:.3g})"


def columns_section(version: int, *, has_ensemble: bool = False, oracle_guides: bool = False) -> str:
    """What the columns of a schema version mean.

    Args:
        has_ensemble: whether a run has several targets, of which the column `transfer` has entries, too.
        oracle_guides: whether an oracle is a floor, or part of a criterion, of some guidance.
    """
    names = arrow_schema(surplus=True, version=version).names
    lines = ["## Columns", "", "| column | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {BY_NAME[name].description.replace('|', chr(92) + '|')} |" for name in names]
    if has_ensemble:
        lines += ["", f"In `transfer`, a model with `{GUIDES.strip()}` after its name was guided on: a further target."]
    if oracle_guides:
        text = "was a floor of guidance, or part of a criterion, and has no part in the other columns of the oracles."
        lines += ["", f"In `oracles`, a model with `{GUIDES.strip()}` after its name {text}"]
    return "\n".join(lines)


def _checked_labels(job: JobSpec, version: int) -> str:
    """What checked the labels, as the end of a sentence."""
    models = job.models
    if not job.independent_oracles:
        return "filter by `conformity`"
    if version < BY_NAME["oracle_p_label_min"].since:
        return "filter by `conformity` and by what the oracle predicts"
    if models.validity:
        share = "`p_valid` estimates the share of\n  people who agree, fitted on answers of people"
        return f"{share} ({code(models.validity)}); `label_is_valid` asks for {MIN_P_VALID}"
    return f"no estimate was fitted on answers of\n  people, so that `label_is_valid` means that {_BY_ORACLES}"


def _limits(job: JobSpec, version: int) -> str:
    models = job.models
    judge = "the judge is a second opinion" if models.judge else "no second CLIP model judged"
    has_guided = any(request.method_record.measures_conformity for request in job.requests)
    clip = "may have guided the sample" if has_guided else "guided no sample"
    of_target = [
        f"`{column.name}`"
        for column in columns_with(Role.SUMMARISED)
        if column.measured_by == "target" and column.since <= version
    ]
    # The line is broken before the last name.
    one_target = enumerated(of_target).replace(" and ", " and\n  ") + " are those of one target."
    return f"""## Limits

- Labels are what was asked of the diffusion model, not what a person saw: {_checked_labels(job, version)}.
- `conformity` comes from one CLIP model, which {clip}, and shares its blind spots ({judge}); {one_target}
- Images inherit the biases and gaps of the diffusion model; rates of error here are not rates on real images.
- Scores are of the stored 8-bit image. Columns are of schema version {version}; `manifest.json`
  has job, versions and checksums."""


def code(text: str, *, table: bool = True) -> str:
    """Text of a user as an inline code span, in which neither Markdown nor HTML has a meaning.

    Args:
        table: whether it is in a table, where a bar must be escaped even in code.
    """
    plain = _UNSEEN.sub(" ", text).strip() or " "
    longest = max((len(run) for run in re.findall(r"`+", plain)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if plain[0] == "`" or plain[-1] == "`" else ""
    inner = plain.replace("|", "\\|") if table else plain
    return f"{fence}{pad}{inner}{pad}{fence}"
