"""The card of an export: README.md with the YAML header that the Hugging Face Hub and `datasets` read."""

from __future__ import annotations

from typing import Any

import yaml

from engine.data.reading.format_registry import Written
from engine.data.run.card import card_config, code, columns_section, size_category
from engine.models.calibration import temperature_text

MAX_CLASSES = 200


def export_card(manifest: dict[str, Any], written: Written) -> str:
    """The card as text."""
    sections = [
        _header(manifest, written),
        f"# {manifest['name']}",
        _origin(manifest),
        _sources(manifest),
        _classes(manifest),
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
        "license": "other",
        "license_name": "unknown",
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "riskforge", "hard-examples", manifest["format"]],
        "size_categories": [size_category(counts["images"])],
        "configs": [card_config(written.data_files, f"{manifest['digest']} {manifest['seed']} {counts}")],
    }
    if written.features is not None:
        header["dataset_info"] = {"features": written.features}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _origin(manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    real = f", and {counts['real']} real ones (`method` is `real`, `scored` is false)." if counts["real"] else "."
    lines = [
        f"{counts['images']} images: {counts['generated']} synthetic ones, sampled from text-to-image diffusion models"
        f" by Riskforge to find where an image classifier, the target, errs or hesitates{real}",
        "",
        f"Selected by {code(manifest['filter'] or 'no filter', table=False)}; order by seed {manifest['seed']}; digest"
        f" `{manifest['digest']}`.",
        *_beyond(manifest),
    ]
    if manifest["deduplication"]:
        deduplication = manifest["deduplication"]
        clip = code(deduplication["clip"], table=False)
        lines += [
            "",
            f"{deduplication['dropped']} near duplicates were left out (cosine of {clip} embeddings"
            f" from {deduplication['threshold']:g} on, within a class); `{deduplication['list']}` names them.",
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


def _sources(manifest: dict[str, Any]) -> str:
    lines = ["## Sources", "", "| run | name | samples taken | plan | target |", "|---|---|---|---|---|"]
    for source in manifest["sources"]:
        target = source["models"].get("target") or {}
        digest, temperature = source["plan_digest"], temperature_text(target)
        used = code(str(target.get("address", ""))) + (f", {code(f'temperature {temperature}')}" if temperature else "")
        cells = (code(source["uri"]), code(source["name"]), str(source["num_taken"]), code(digest), used)
        lines.append(f"| {' | '.join(cells)} |")
    if manifest["real"]:
        lines.append(f"| {code(manifest['real']['address'])} | real images | {manifest['real']['num_taken']} | | |")
    return "\n".join(lines)


def _classes(manifest: dict[str, Any]) -> str:
    classes = manifest["counts"]["classes"]
    lines = ["## Classes", "", "| class | images |", "|---|---|"]
    lines += [f"| {code(name)} | {count['ok'] + count['rejected']} |" for name, count in classes.items()][:MAX_CLASSES]
    if len(classes) > MAX_CLASSES:
        lines += ["", f"{len(classes) - MAX_CLASSES} more are in `manifest.json`."]
    return "\n".join(lines)


def _limits(manifest: dict[str, Any]) -> str:
    real = "; those of real images are of their data set" if manifest["counts"]["real"] else ""
    return f"""## Limits

- Labels of synthetic images are what was asked of the diffusion model, not what a person saw: filter by `conformity`,
  and by the oracle where there is one{real}.
- Scores are those of the sources' targets and CLIP models; columns are of schema version {manifest["schema_version"]}.
- The licence follows from those of the models and of the real images; set `license` in the header once it is known."""
