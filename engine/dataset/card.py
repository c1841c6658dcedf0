"""The data set's card: README.md with the YAML header that the Hugging Face Hub and `datasets` read."""

from __future__ import annotations

import re
from typing import Any

import yaml

from engine.dataset.schema import DESCRIPTIONS, arrow_schema
from engine.dataset.shards import SHARDS
from engine.dataset.summary import GroupSummary, Spread
from engine.spec import ConditioningSpec, JobSpec, RequestSpec

_METHODS = {
    "prompt": "sampled without guidance",
    "boundary": "guided by the target's KLDB, towards the decision boundary between the classes of the request",
    "risky": "guided to risk for the target under conformity to the class",
    "custom": "guided by a criterion of its own, whose code is not part of this data set",
}
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
_TABLE_HEAD = (
    "request", "context", "images / attempts", "errors", "risk", "KLDB", "entropy", "conformity", "oracle agrees",
    "valid failures", "transfer",
)  # fmt: skip
MAX_TABLE_ROWS = 200


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
        _requests(job),
        _table(groups),
        loading_section(job.output.image_format),
        columns_section(manifest["schema_version"]),
        _limits(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _header(job: JobSpec, manifest: dict[str, Any], data_files: list[str]) -> str:
    methods = sorted({f"guidance-{request.guidance_section}" for request in job.requests})
    header = {
        "pretty_name": job.name,
        "license": "other",
        "license_name": "unknown",
        "task_categories": ["image-classification"],
        "annotations_creators": ["machine-generated"],
        "source_datasets": ["original"],
        "tags": ["synthetic", "riskforge", "webdataset", "hard-examples", *methods],
        "size_categories": [size_category(manifest["counts"]["samples"]["ok"])],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": data_files}]}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def size_category(num_images: int) -> str:
    """How the Hub calls a data set of so many images."""
    return next((name for limit, name in _SIZES if num_images < limit), "n>1T")


def _origin(job: JobSpec, manifest: dict[str, Any]) -> str:
    samples, shards = manifest["counts"]["samples"], manifest["counts"]["shards"]
    state = "" if manifest["complete"] else (
        f"\n\n**Not complete:** {shards['committed']} of {shards['planned']} shards were there when this was written."
    )  # fmt: skip
    return (
        "**Every image is synthetic**: sampled from a text-to-image diffusion model by "
        "Riskforge to find where an image classifier, the target, errs or hesitates. No image is a photograph."
        f"{_provenance(job)}\n\n"
        f"{samples['ok']} images in {shards['committed']} shards, of {samples['attempted']} attempts "
        f"({samples['rejected']} rejected, {samples['failed']} failed, {samples['accepted']} accepted). "
        f"Seed {job.seed}; plan `{manifest['plan_digest']}`.{state}\n\n"
        f"{_stored_rejected(job, samples)}"
        "**Licence:** not stated by the engine. It follows from the licences of the models below, above all of the "
        "diffusion model; set `license` in the header once it is known. Of the models' licences only what their own "
        "files say is listed."
    )


def _provenance(job: JobSpec) -> str:
    if not job.output.provenance:
        return ""
    return (
        " Every file says so itself: its XMP has IPTC's `DigitalSourceType` "
        "[`trainedAlgorithmicMedia`](http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia)."
    )


def _stored_rejected(job: JobSpec, samples: dict[str, int]) -> str:
    if not (job.output.store_rejected and samples["rejected"]):
        return ""
    return (
        f"**The {samples['rejected']} rejected images are stored too.** Their label may be wrong: keep the samples "
        "whose JSON says `accepted: true`, unless you want to study the others.\n\n"
    )


def _models(models: dict[str, Any]) -> str:
    lines = ["## Models", "", "| role | model |", "|---|---|"]
    for role, about in models.items():
        each = about if isinstance(about, list | tuple) else [about]
        lines += [f"| {role} | {_model_text(one)} |" for one in each]
    return "\n".join(lines)


def _model_text(about: Any) -> str:
    if not isinstance(about, dict):
        return code(str(about))
    return ", ".join(f"{name} {code(str(value))}" for name, value in about.items() if name != "labels")


def _amount(request: RequestSpec) -> str:
    if not request.has_quota:
        return f"{request.count} for each class or subset and context"
    return (
        f"{request.num_wanted} accepted ones for each class or subset, from at most {request.attempts_limit} attempts "
        "(`surplus` in metadata.parquet marks what is beyond)"
    )


def _requests(job: JobSpec) -> str:
    lines = ["## How it was made", ""]
    for request in job.requests:
        wanted = request.boundary if request.boundary is not None else request.classes
        classes = "all classes" if wanted == "all" else ", ".join(code(str(one), table=False) for one in wanted or ())
        joint = " jointly" if request.boundary is not None else ""
        lines += [
            f"- **{request.name}**: method `{request.method}`, {_METHODS[request.guidance_section]}; {classes}{joint}, "
            f"{_amount(request)}; contexts: {len(request.contexts)}.",
            f"  - sampling: {_parameters(job.sampling_of(request).model_dump())}",
        ]
        if request.fresh:
            lines.append(f"  - fresh: the seeds are those of {code(str(request.fresh), table=False)} alone")
        if request.conditioning:
            lines.append(f"  - conditioning: {_conditioning(request.conditioning)}")
        if request.prompt:
            lines.append(f"  - prompt: {code(request.prompt, table=False)}")
        if request.guidance_section in ("boundary", "custom"):
            guidance = getattr(job.guidance_of(request), request.guidance_section)
            lines.append(f"  - guidance: {_parameters(guidance.model_dump() | {'alpha': guidance.step_size})}")
        elif request.method == "risky":
            lines.append(f"  - guidance: {_parameters(job.guidance_of(request).risky.model_dump())}")
        if request.accept:
            lines.append(f"  - accepted when: {_parameters(request.accept)}")
    return "\n".join(lines)


def _conditioning(spec: ConditioningSpec) -> str:
    """What the embeddings of a request were, with the parameters that had an effect."""
    if spec.images is not None:
        return f"embeddings of given images, {_parameters({'images': spec.images, 'noise_level': spec.noise_level})}"
    kept: dict[str, Any] = {"artefact": spec.artefact, "noise_level": spec.noise_level}
    if not spec.is_screened:
        return f"embeddings drawn from class statistics, not screened, {_parameters(kept)}"
    kept |= {"threshold": spec.threshold, "max_draws": spec.max_draws}
    return f"embeddings drawn until the target's error predictor expected an error, {_parameters(kept)}"


def _parameters(values: dict[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if value not in (None, "")}
    return ", ".join(f"{name} {code(str(value), table=False)}" for name, value in shown.items())


def _table(groups: list[GroupSummary]) -> str:
    has_judge = any(group.judge_conformity is not None for group in groups)
    heads = [*_TABLE_HEAD, *(["judge's conformity"] if has_judge else [])]
    lines = [
        "## Scores",
        "",
        "Medians per request and context, over all scored samples, rejected ones too; in brackets the middle half. "
        "Risk, KLDB and entropy are in nats under the target, conformity is the cosine of CLIP embeddings of image and "
        "class prompt. A valid failure is a sample on which the target errs while the oracle agrees."
        + (" The judge is a second CLIP model that guided nothing; its conformity is a mean." if has_judge else ""),
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for group in groups[:MAX_TABLE_ROWS]:
        cells = [
            group.request,
            code(group.context) if group.context else "none",
            f"{group.ok} / {group.attempted}",
            _percent(group.error_rate),
            _spread(group.risk),
            _spread(group.kldb),
            _spread(group.entropy),
            _spread(group.conformity),
            _percent(group.oracle_agreement),
            _percent(group.valid_failure_rate),
            "; ".join(
                f"{code(one.model)} errors {_percent(one.error_rate)}, risk {one.risk_median:.3g}"
                for one in group.transfer
            ),
            *([_number(group.judge_conformity)] if has_judge else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(groups) > MAX_TABLE_ROWS:
        lines += ["", f"{len(groups) - MAX_TABLE_ROWS} more rows are under `summary` in `manifest.json`."]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3g} ({spread.q25:.3g} to {spread.q75:.3g})"


def loading_section(extension: str, rows: str = "Every attempt, failed ones too,") -> str:
    """How the shards are read, with code that runs.

    Args:
        extension: of the images.
        rows: what the rows of the metadata are.
    """
    return f"""## Loading

The shards are plain WebDataset tars: `KEY.{extension}`, `KEY.json` (the columns before `batch_size`), `KEY.cls` (the
label). Run these lines in the folder of the data set.

```python
import glob
import webdataset as wds

files = sorted(glob.glob("{SHARDS}/*.tar"))
samples = wds.WebDataset(files, shardshuffle=False).decode("pil").to_tuple("{extension}", "cls", "json")
for image, label, record in samples:
    print(record["key"], image.size, label, record["risk"])
```

```python
import os
from datasets import load_dataset

samples = load_dataset(os.getcwd(), split="train")
print(samples[0]["__key__"], samples[0]["cls"], samples[0]["json"]["risk"])
```

{rows} is a row of `metadata.parquet`:

```python
import pyarrow.parquet as pq

rows = pq.read_table("metadata.parquet", filters=[("risk", ">", 2.0), ("status", "==", "ok")])
for row in rows.select(["key", "risk", "conformity", "kldb"]).to_pylist()[:10]:
    print(row)
```"""


def columns_section(version: int) -> str:
    """What the columns of a schema version mean."""
    names = arrow_schema(surplus=True, version=version).names
    lines = ["## Columns", "", "| column | meaning |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {DESCRIPTIONS[name].replace('|', chr(92) + '|')} |" for name in names])


def _limits(manifest: dict[str, Any]) -> str:
    return f"""## Limits

- Labels are what was asked of the diffusion model, not what a person saw: filter by `conformity`, and by the oracle
  where there is one.
- `conformity` comes from one CLIP model, which may have guided the sample, and shares its blind spots (a job's `judge`
  is a second opinion); `risk`, `kldb` and `entropy` are those of one
  target.
- Images inherit the biases and gaps of the diffusion model; rates of error here are not rates on real images.
- Scores are of the stored 8-bit image. Columns are of schema version {manifest["schema_version"]}; `manifest.json`
  has job, versions and checksums."""


def code(text: str, *, table: bool = True) -> str:
    """Somebody else's text as an inline code span, in which neither Markdown nor HTML has a meaning.

    Args:
        table: whether it stands in a table, where a bar must be escaped even in code.
    """
    plain = _UNSEEN.sub(" ", text).strip() or " "
    longest = max((len(run) for run in re.findall(r"`+", plain)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if plain[0] == "`" or plain[-1] == "`" else ""
    inner = plain.replace("|", "\\|") if table else plain
    return f"{fence}{pad}{inner}{pad}{fence}"
