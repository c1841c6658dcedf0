"""The card of an export: README.md with the YAML header that the Hugging Face Hub and `datasets` read."""

from __future__ import annotations

from typing import Any

import yaml

from engine.dataset.card import code, columns_section, loading_section, size_category

MAX_CLASSES = 200
# By the header, which names the files. Left to themselves, builders take a class called train for a part of the data.
LOADING = """## Loading

Run these lines in the folder of the data set.

```python
import os
from datasets import load_dataset

samples = load_dataset(os.getcwd(), split="train")
print(samples[0]["image"].size, samples[0]["label"], samples[0]["risk"])
```"""


def export_card(manifest: dict[str, Any], data_files: list[str], image_format: str) -> str:
    """The card as text.

    Args:
        manifest: of the export.
        data_files: patterns, relative to the data set.
        image_format: extension of the images of WebDataset shards.
    """
    sections = [
        _header(manifest, data_files),
        f"# {manifest['name']}",
        _origin(manifest),
        _sources(manifest),
        _classes(manifest),
        loading_section(image_format, "Every sample") if manifest["format"] == "webdataset" else LOADING,
        columns_section(manifest["schema_version"]),
        _limits(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _header(manifest: dict[str, Any], data_files: list[str]) -> str:
    header = {
        "pretty_name": manifest["name"],
        "license": "other",
        "license_name": "unknown",
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "riskforge", "hard-examples", manifest["format"]],
        "size_categories": [size_category(manifest["counts"]["samples"]["ok"])],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": data_files}]}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _origin(manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    real = f", and {counts['real']} real ones (`method` is `real`; they have no scores)." if counts["real"] else "."
    lines = [
        f"{counts['images']} images: {counts['generated']} synthetic ones, sampled from text-to-image diffusion models"
        f" by Riskforge to find where an image classifier, the target, errs or hesitates{real}",
        "",
        f"Selected by {code(manifest['filter'] or 'no filter', table=False)}; order by seed {manifest['seed']}; digest"
        f" `{manifest['digest']}`.",
    ]
    if manifest["deduplication"]:
        about = manifest["deduplication"]
        lines += [
            "",
            f"{about['dropped']} near duplicates were left out (cosine of {code(about['clip'], table=False)} embeddings"
            f" from {about['threshold']:g} on, within a class); `{about['list']}` names them.",
        ]
    return "\n".join(lines)


def _sources(manifest: dict[str, Any]) -> str:
    lines = ["## Sources", "", "| run | name | samples taken | plan | target |", "|---|---|---|---|---|"]
    for one in manifest["sources"]:
        target = (one["models"].get("target") or {}).get("address", "")
        digest = one["plan_digest"]
        cells = (code(one["uri"]), code(one["name"]), str(one["num_taken"]), code(digest), code(str(target)))
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
    return f"""## Limits

- Labels are what was asked of the diffusion model, not what a person saw: filter by `conformity`, and by the oracle
  where there is one.
- Scores are those of the sources' targets and CLIP models; columns are of schema version {manifest["schema_version"]}.
- The licence follows from those of the models and of the real images; set `license` in the header once it is known."""
