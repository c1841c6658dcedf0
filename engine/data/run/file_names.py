"""Names of the files of a run, of a rescoring and of an export, relative to their folder."""

from __future__ import annotations

PLANS = "_state/plan"
SUCCESS = "_SUCCESS"
METADATA = "metadata.parquet"
MANIFEST = "manifest.json"
CARD = "README.md"
REPORT = "report.html"
EVALUATION = "evaluation.json"
# How a run differs from its baseline; `riskforge compare --baseline` and `riskforge run --baseline` write it.
COMPARISON = "comparison.json"
# What the study found that a run is part of; `riskforge study` writes it.
STUDY = "study.json"
# Unguided twins that `riskforge evaluate` found among the samples of requests without guidance.
TWINS_TABLE = "twins.parquet"
WIDS_INDEX = "shards/wids.json"
TIMM_INFO = "shards/_info.json"
# Keys of accepted samples beyond their quota, a line each: readers of the tars skip them.
SURPLUS_LIST = "shards/surplus.txt"
# The schema version from which on every closed run has its list of surplus.
SURPLUS_LIST_SINCE = 3
# In an export: the name of each class by its index; of a folder by class also the label of each of its folders, and
# the folders in the order of labels, which is timm's `class_map`.
CLASSES = "classes.json"
FOLDER_LABELS = "folders.json"
CLASS_MAP = "class_map.txt"
# Folders of `riskforge rescore`, one for each target, and the file that marks such a folder.
RESCORED = "rescored"
RESCORING = "_state/rescoring.json"
# The folder of `riskforge curate` in a curated run, and its files: options, parent and outcome; what was drawn; and
# of a reward that was learned the reward, the state of its monitor and the records that a defence removed.
CURATION = "curation"
CURATION_DOCUMENT = "curation/curation.json"
SELECTION = "curation/selection.parquet"
REWARD = "curation/reward.safetensors"
AUDIT = "curation/audit.safetensors"
SUSPECTS = "curation/suspects.jsonl"
# The state of a monitor whose alarm stopped a curation, in an output in which nothing is selected yet.
STOPPED_AUDIT = "_state/audit.safetensors"
# In manifests of folders that are not runs.
RESCORED_FROM = "rescored_from"
EXPORT_KIND = "export"

RUN_FILES = (
    SUCCESS, METADATA, MANIFEST, CARD, REPORT, EVALUATION, COMPARISON, STUDY, TWINS_TABLE, WIDS_INDEX, TIMM_INFO,
    SURPLUS_LIST,
)  # fmt: skip
CURATION_FILES = (CURATION_DOCUMENT, SELECTION, REWARD, AUDIT, SUSPECTS)
