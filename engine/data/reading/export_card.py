"""The card of an export: README.md with the YAML header that the Hugging Face Hub and `datasets` read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import yaml

from engine.data.reading.format_registry import Written
from engine.data.reading.origins import Origin, total_counts
from engine.data.run.card import (
    card_config,
    code,
    columns_section,
    each,
    model_text,
    request_lines,
    size_category,
)
from engine.data.run.file_names import CLASSES, MANIFEST
from engine.job.class_names import label_names
from engine.models.calibration import temperature_text
from engine.models.licences import UNKNOWN, licence_of

MAX_CLASSES = 200
# Of the runs that a data set was made of, and of its models.
MAX_RUNS = 50
MAX_MODELS = 100
# What counts of others may make of a sentence.
_ODD_COUNTS = (ValueError, TypeError, KeyError, AttributeError, IndexError)


def export_card(manifest: dict[str, Any], written: Written, labels: Sequence[str], origins: Sequence[Origin]) -> str:
    """The card as text.

    Args:
        labels: class names in index order.
        origins: the runs that the samples come from.
    """
    sections = [
        _header(manifest, written),
        f"# {manifest['name']}",
        _summary(manifest),
        _licence(manifest),
        _sources(manifest),
        _requests(origins),
        _models(origins),
        _classes(manifest, labels),
        written.loading,
        columns_section(
            manifest["schema_version"],
            has_ensemble=any("further_targets" in source["models"] for source in manifest["sources"]),
            oracle_guides=any(_oracle_guides(source["models"]) for source in manifest["sources"]),
        ),
        _limits(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _oracle_guides(models: dict[str, Any]) -> bool:
    """Whether the last of the oracles that a run describes is a floor of its guidance."""
    oracles = models.get("oracles") or [models.get("oracle")]
    return bool(oracles[-1]) and "guides" in oracles[-1]


def _header(manifest: dict[str, Any], written: Written) -> str:
    counts = manifest["counts"]
    header: dict[str, Any] = {
        "pretty_name": manifest["name"],
        **_header_licence(manifest["license"]),
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "riskforge", "hard-examples", manifest["format"]],
        "size_categories": [size_category(counts["images"])],
        "configs": [card_config(written.data_files, f"{manifest['digest']} {manifest['seed']} {counts}")],
    }
    if manifest["authors"]:
        header["authors"] = manifest["authors"]
    if written.features is not None:
        header["dataset_info"] = {"features": written.features}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _header_licence(licence: str) -> dict[str, str]:
    """The Hub writes SPDX's identifiers small; what is none of these is another licence, with its name."""
    name = "-".join(licence.lower().split()) or UNKNOWN
    is_own = not licence or " " in licence or name.startswith("licenseref-")
    return {"license": "other", "license_name": name} if is_own else {"license": name}


def _summary(manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    real = (
        f", and {counts['real']} real ones (`method` is `real`, `scored` is false): no model scored these, and what"
        " their columns of scores hold (0, false or -1) means nothing."
        if counts["real"]
        else "."
    )
    lines = [
        f"{counts['images']} images: {counts['generated']} synthetic ones, sampled from text-to-image diffusion models"
        f" by Riskforge to find where an image classifier, the target, errs or hesitates{real}",
        "",
        "**Error rates here are not rates on real images.** The synthetic images were searched for errors, and accepted"
        " by the rules below: how often the target errs on them says nothing of how often it errs on photographs.",
        "",
        f"Selected by {code(manifest['filter'] or 'no filter', table=False)}; order by seed {manifest['seed']}; digest"
        f" `{manifest['digest']}`.",
        *_beyond(manifest),
        *_deduplication(manifest["deduplication"]),
        *_real(manifest["real"]),
    ]
    return "\n".join(lines)


def _beyond(manifest: dict[str, Any]) -> list[str]:
    """What it has apart from accepted samples within their quota."""
    rejected = manifest["counts"]["samples"]["rejected"]
    lines = []
    if rejected:
        lines += [
            "",
            f"**{rejected} images were rejected by the rule of their request** (`accepted` is false); their label may"
            " be wrong.",
        ]
    if manifest["with_surplus"]:
        lines += ["", "Accepted samples beyond the quota of their request were taken, too."]
    return lines


def _deduplication(deduplication: dict[str, Any]) -> list[str]:
    if not deduplication:
        return []
    clip = code(deduplication["clip"], table=False)
    lines = [
        "",
        f"{deduplication['dropped']} near duplicates were left out (cosine of {clip} embeddings"
        f" from {deduplication['threshold']:g} on, within a class); `{deduplication['list']}` names them."
        + (
            f" {deduplication['topped_up']} samples beyond the quotas took their place."
            if deduplication["dropped"]
            else ""
        ),
    ]
    short = [cell for cell in deduplication["cells"] if cell["missing"]]
    if short:
        lines += ["", "| run | request | class | images | asked for | near duplicates | replaced |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for cell in short[:MAX_CLASSES]:
            wanted = str(cell["wanted"] or "")
            names = (code(cell["run"]), code(cell["request"]), code(cell["class"]))
            numbers = (str(cell["kept"]), wanted, str(cell["dropped"]), str(cell["topped_up"]))
            lines.append(f"| {' | '.join((*names, *numbers))} |")
        if len(short) > MAX_CLASSES:
            lines += ["", f"{len(short) - MAX_CLASSES} more are in `{MANIFEST}`."]
    return lines


def _real(real: dict[str, Any]) -> list[str]:
    if not real:
        return []
    which = "every class of the target" if real["classes"] == "all" else "the classes of the synthetic ones alone"
    amount = f"{real['per_class']} of each class" if real["per_class"] else f"a share of {real['ratio']:g}"
    return [
        "",
        f"Real images: {amount}, balanced by class, of {which}; `start_key` names the file of each in"
        f" {code(real['address'], table=False)}, `start_sha256` has the checksum of its pixels.",
    ]


def _licence(manifest: dict[str, Any]) -> str:
    if manifest["license"]:
        text = (
            f"**Licence:** {code(manifest['license'], table=False)}, as whoever made this data set states; what the"
            " licences of the models below and of the real images ask for holds, too."
        )
    else:
        text = (
            "**Licence:** not stated. It follows from those of the models below, above all of the diffusion model, and"
            " of the real images; set `license` in the header once it is known (`--license` does)."
        )
    if not manifest["authors"]:
        return text
    return f"{text}\n\n**Authors:** {', '.join(code(author, table=False) for author in manifest['authors'])}."


def _sources(manifest: dict[str, Any]) -> str:
    lines = ["## Sources", "", "| run | name | samples taken | plan | target | keys |", "|---|---|---|---|---|---|"]
    for source in manifest["sources"]:
        target = source["models"].get("target") or {}
        digest, temperature = source["plan_digest"], temperature_text(target)
        used = code(str(target.get("address", ""))) + (f", {code(f'temperature {temperature}')}" if temperature else "")
        keys = f"begin with `{source['key_prefix']}`" if source["key_prefix"] else "as in the run"
        cells = (code(source["uri"]), code(source["name"]), str(source["num_taken"]), code(digest), used, keys)
        lines.append(f"| {' | '.join(cells)} |")
    if manifest["real"]:
        lines.append(f"| {code(manifest['real']['address'])} | real images | {manifest['real']['num_taken']} | | | |")
    if any(source["key_prefix"] for source in manifest["sources"]):
        lines += [
            "",
            "Runs of one job name have other images under the same keys: those of the later ones have a prefix here.",
        ]
    return "\n".join(lines)


def _requests(origins: Sequence[Origin]) -> str:
    """What each run was asked for: method, prompt, contexts, guidance and rule of every request; equal jobs once."""
    groups: dict[str, list[Origin]] = {}
    for origin in origins:
        groups.setdefault("\n".join(_of_origins([origin], with_outcome=False)), []).append(origin)
    lines = ["## How it was made", "", "What the runs were asked for, whatever was selected of them since."]
    for group in list(groups.values())[:MAX_RUNS]:
        uris = [code(origin.uri, table=False) for origin in group[:MAX_RUNS]]
        more = f" and {len(group) - MAX_RUNS} more" if len(group) > MAX_RUNS else ""
        lines += ["", f"### {code(group[0].name or group[0].uri, table=False)}", ""]
        lines += [f"{'Runs' if len(group) > 1 else 'Run'}: {', '.join(uris)}{more}.", "", *_of_origins(group)]
    if len(groups) > MAX_RUNS:
        lines += ["", f"{len(groups) - MAX_RUNS} more jobs are in `{MANIFEST}`."]
    return "\n".join(lines)


def _of_origins(origins: Sequence[Origin], *, with_outcome: bool = True) -> list[str]:
    """The requests of runs that differ in their seeds at most."""
    job = origins[0].parsed_job()
    if job is None:
        return ["Its job is not known."]
    for counts in (total_counts(origins) if with_outcome else {}, {}):
        with suppress(*_ODD_COUNTS):
            lines = request_lines(job, counts)
            is_one = with_outcome and len(origins) == 1
            return lines if is_one else [line for line in lines if not line.startswith("  - fresh:")]
    return ["Its job cannot be read."]


def _models(origins: Sequence[Origin]) -> str:
    """Every model once with its licence, in the order of the runs."""
    rows: dict[str, None] = {}
    for origin in origins:
        described = origin.models or _named_models(origin)
        for role, models in described.items():
            rows |= dict.fromkeys(f"| {code(role)} | {_model(model)} |" for model in each(models))
    lines = ["## Models", "", "| role | model |", "|---|---|", *list(rows)[:MAX_MODELS]]
    if len(rows) > MAX_MODELS:
        lines += ["", f"{len(rows) - MAX_MODELS} more are in `{MANIFEST}`."]
    return "\n".join([*lines, "", "Licences are as the models' own files state them; `unknown` where they state none."])


def _model(model: Any) -> str:
    if isinstance(model, dict) and "license" not in model and isinstance(model.get("address"), str):
        model = model | {"license": licence_of(model["address"])}
    try:
        return model_text(model)
    except ValueError:
        # Anybody may have written the manifest.
        return f"{code(str(model.get('address', '')))}, license {code(str(model.get('license', UNKNOWN)))}"


def _named_models(origin: Origin) -> dict[str, Any]:
    """The models of a run that has no manifest yet, by the addresses in its job."""
    job = origin.parsed_job()
    if job is None:
        return {}
    named = job.models.model_dump(mode="json", exclude_none=True)
    return {role: [{"address": address} for address in each(value)] for role, value in named.items() if value}


def _classes(manifest: dict[str, Any], labels: Sequence[str]) -> str:
    counts = manifest["counts"]["classes"]
    names = label_names(labels)
    lines = [
        "## Classes",
        "",
        f"A label is an index into this table, which `{CLASSES}` has, too.",
        "",
        "| index | class | synthetic | real |",
        "|---|---|---|---|",
    ]
    for index, name in list(enumerate(names))[:MAX_CLASSES]:
        of_class = counts.get(name, {"ok": 0, "rejected": 0, "real": 0})
        synthetic = of_class["ok"] + of_class["rejected"] - of_class["real"]
        lines.append(f"| {index} | {code(name)} | {synthetic} | {of_class['real']} |")
    if len(names) > MAX_CLASSES:
        lines += ["", f"{len(names) - MAX_CLASSES} more are in `{CLASSES}`, their counts in `{MANIFEST}`."]
    return "\n".join(lines)


def _limits(manifest: dict[str, Any]) -> str:
    real = "; those of real images are of their data set" if manifest["counts"]["real"] else ""
    return f"""## Limits

- Labels of synthetic images are what was asked of the diffusion model, not what a person saw: filter by `conformity`,
  and by the oracle where there is one{real}.
- Scores are those of the sources' targets and CLIP models; columns are of schema version {manifest["schema_version"]}.
- Images inherit the biases and gaps of the diffusion models."""
