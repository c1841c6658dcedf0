"""Where models are: `zoo:NAME/PART`, a folder, or a hub id. Reads configurations without importing torch.

Classifiers may also be files or factories: `engine.models.targets`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.spec import JobSpec, ModelsSpec, RequestSpec
from engine.job.spec_messages import nearest
from engine.models.classifier_checks import check_classifier, check_clip, class_names
from engine.models.custom_methods import method_problems
from engine.models.folders import (
    PIPELINE_INDEX,
    VARIANTS,
    has_weights,
    is_left_out,
    part_classes,
    read_config,
    weighted_parts,
    weights_variant,
)
from engine.models.foreign_description import check_foreign, foreign_digest, foreign_labels
from engine.models.pipelines import (
    check_decoder,
    check_decoder_weights,
    check_pipeline,
    check_pipeline_weights,
    decoder_problem,
    has_configurations,
    request_problems,
)
from engine.models.targets import as_file, is_foreign
from engine.models.weights import have_same_weights

ZOO = Path(__file__).parents[1] / "zoo"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# In the folder of a conditioning artefact, which is no model and yet part of a zoo.
ARTEFACT_DOCUMENT = "conditioning.json"
_CONFIGURATION = ("*.json", "*.txt")
_WEIGHTS = "*.safetensors"
# Whole, in parts, and the list of the parts.
_OF_VARIANT = (".safetensors", "-*.safetensors", ".json")
_IMAGE_TOWER = ("vision_model.", "visual_projection.")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is found.

    Attributes:
        address: as the job has it.
        folder: the local folder, or None for a hub id that is not on this machine.
        is_hub: whether it is a hub id; its local folder need not be complete.
    """

    address: str
    folder: Path | None
    is_hub: bool = False


def locate(address: str) -> Source:
    """Find a model without downloading anything.

    Raises:
        JobError: no zoo part of that name (the nearest is offered), no such folder and not a hub id.
    """
    if address.startswith("zoo:"):
        return Source(address, _zoo_folder(address.removeprefix("zoo:").rstrip("/")))
    try:
        folder = Path(address).expanduser()
        if folder.is_dir():
            return Source(address, folder)
        if folder.is_file():
            raise JobError(f"'{address}' is a file; give the folder of the model")
    except (OSError, RuntimeError, ValueError) as error:
        raise JobError(f"'{address}' cannot be looked at ({getattr(error, 'strerror', None) or error})") from None
    if not _HUB_ID.fullmatch(address):
        raise JobError(f"'{address}' is neither a folder nor a hub id (owner/name) nor a zoo part (zoo:NAME/PART)")
    return Source(address, _cached_snapshot(address), is_hub=True)


def resolve(address: str) -> Path:
    """The local folder of a model; what is missing of a hub id is downloaded (safetensors and configurations only).

    Of weights that are there in several precisions the plain ones are; another (`fp16`) only where there are no others.

    Raises:
        JobError: as `locate`, the hub cannot be reached, or it has a pipeline that does not run here.
    """
    source = locate(address)
    if source.folder is not None and not source.is_hub:
        return source.folder
    try:
        return _download(address)
    except JobError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(f"'{address}' is not a folder here and could not be had from the model hub ({reason})") from None


def _download(address: str) -> Path:
    import huggingface_hub

    def download(patterns: list[str], ignored: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(address, allow_patterns=patterns, ignore_patterns=ignored))

    # With the dots of a variant in a name; `non_ema` may stand anywhere.
    others = [f"*.{one}.*" for one in VARIANTS if one != "non_ema"] + ["*non_ema*"]
    folder = download(list(_CONFIGURATION), others)
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    if is_pipeline:
        # Before gigabytes are fetched for nothing; a job's own wishes are checked later.
        check_pipeline(folder, address, checks_safety=False)
    # Beside a pipeline's parts there may be other weights of many gigabytes.
    where = {part: "" if part == "." else f"{part}/" for part in weighted_parts(folder)}
    folder = download([f"{prefix}{_WEIGHTS}" for prefix in where.values()], others)
    for variant in VARIANTS:
        lacking = [prefix for part, prefix in where.items() if not has_weights(folder / part)]
        if lacking:
            folder = download([f"{prefix}*.{variant}{ending}" for prefix in lacking for ending in _OF_VARIANT], [])
    if is_pipeline:
        check_pipeline_weights(folder, address, checks_safety=False)
    return folder


def read_labels(address: str) -> list[str] | None:
    """The class names of a classifier in index order, or None for a hub id that is not on this machine.

    Raises:
        JobError: the folder has no usable `config.json` with `id2label`, or with timm's `label_names`; or as
            `engine.models.foreign_description.foreign_labels`.
    """
    if is_foreign(address):
        return foreign_labels(address)
    source = locate(address)
    if source.folder is None:
        return None
    return class_names(source.folder, address)


def model_digest(address: str) -> str:
    """Digest of everything that is loaded from a model's folder: names and contents, not the folder's place.

    Of files and factories: `engine.models.foreign_description.foreign_digest`.
    """
    if is_foreign(address):
        return foreign_digest(address)
    folder = resolve(address)
    return _folder_digest(folder, _loaded_files(folder))


def _folder_digest(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(_file_digest(path))
    return digest.hexdigest()[:32]


def model_digests(job: JobSpec, *, is_made: bool = False) -> dict[str, Any]:
    """Digest of every model of a job by role, as `engine.job.plan.plan_identity` takes them.

    Args:
        is_made: whether this is the job of a run that is there: it is read whatever its models are to each other.

    Raises:
        JobError: a model cannot be had, or one that is to judge another is that other (`check_independent`).
    """
    models = job.models
    diffusion = sorted({request.diffusion or models.diffusion for request in job.requests})
    known: dict[str, str] = {}

    def of(address: str) -> str:
        if address not in known:
            known[address] = model_digest(address)
        return known[address]

    digests = {
        "diffusion": {address: of(address) for address in diffusion},
        "clip": of(models.clip),
        "target": of(models.target),
        "transfer": [of(address) for address in models.transfer],
        "oracle": of(models.oracle) if models.oracle else "",
        **({"guidance_decoder": of(models.guidance_decoder)} if models.guidance_decoder else {}),
        # A checker's weights are in the digest of its pipeline.
        **({"safety_checker": "off"} if models.safety_checker == "off" else {}),
    }
    if not is_made:
        # After the digests: what was missing of a hub id is here now.
        check_independent(models)
    if models.judge is None:
        # No key either: plans without a judge keep the digest that they had before there were judges.
        return digests
    return digests | {"judge": of(models.judge)}


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


def _independence_problems(job: JobSpec) -> list[str]:
    try:
        check_independent(job.models)
    except JobError as error:
        return list(error.problems)
    return []


def _are_same(address: str, other: str, part: tuple[str, ...] = ("",)) -> bool:
    places = [as_file(one) or (None if is_foreign(one) else locate(one).folder) for one in (address, other)]
    if address == other:
        return True
    first, second = places
    return first is not None and second is not None and have_same_weights(first, second, part)


def check_addresses(job: JobSpec, *, with_artefacts: bool = True) -> None:
    """Check that every model of a job can be found and is of the right kind, without loading one.

    Args:
        with_artefacts: look at its conditioning artefacts and at methods of the user's own too; whoever makes
            artefacts does not.

    Raises:
        JobError: all problems, a line each, by field.
    """
    problems: list[str] = []
    if job.models.judge == job.models.clip:
        problems.append(f"models.judge: '{job.models.judge}' is models.clip too; name another CLIP model, or none")
    for field, address, check in _roles(job):
        try:
            if check is _check_classifier and is_foreign(address):
                check_foreign(address)
                continue
            source = locate(address)
            if source.folder is not None:
                check(source.folder, address)
        except JobError as error:
            problems += [f"{field}: {problem}" for problem in error.problems]
    if not problems:
        problems += _label_problems(job) or [
            *_independence_problems(job),
            *_request_problems(job),
            *_decoder_problems(job),
        ]
    problems = problems or _weights_problems(job)
    if not problems and with_artefacts:
        problems += method_problems(job)
        labels = read_labels(job.models.target)
        for number, request in enumerate(job.requests):
            problems += _artefact_problems(number, request, labels)
    if problems:
        raise JobError(problems)


def image_encoder_digest(address: str) -> str:
    """Digest of what decides the image embeddings of a Stable unCLIP pipeline: encoder and preprocessing.

    Equal encoders have equal digests, whichever pipeline they are part of.
    """
    folder = resolve(address)
    parts = ("image_encoder", "feature_extractor")
    return _folder_digest(folder, [one for one in _loaded_files(folder) if one.relative_to(folder).parts[0] in parts])


def _check_classifier(folder: Path, address: str) -> None:
    check_classifier(folder, address, is_whole=not locate(address).is_hub)


def _check_clip(folder: Path, address: str) -> None:
    check_clip(folder, address, is_whole=not locate(address).is_hub)


def _check_diffusion(folder: Path, address: str, *, checks_safety: bool) -> None:
    # Of the hub it may be here in part: `resolve` checks what it downloads.
    if has_configurations(folder) or not locate(address).is_hub:
        check_pipeline(folder, address, checks_safety=checks_safety)


def _weights_problems(job: JobSpec) -> list[str]:
    """Pipelines and decoders without weights that can be loaded; of the hub they are not here yet."""
    checks_safety = job.models.safety_checker != "off"
    check_weights = partial(check_pipeline_weights, checks_safety=checks_safety)
    roles: list[tuple[str, str | None, Callable[[Path, str], None]]] = [
        ("models.diffusion", job.models.diffusion, check_weights),
        ("models.guidance_decoder", job.models.guidance_decoder, check_decoder_weights),
        *((f"requests.{place}.diffusion", one.diffusion, check_weights) for place, one in enumerate(job.requests)),
    ]
    problems = []
    for field, address, check in roles:
        source = locate(address) if address else None
        try:
            if source is not None and source.folder is not None and not source.is_hub:
                check(source.folder, source.address)
        except JobError as error:
            problems += [f"{field}: {problem}" for problem in error.problems]
    return problems


def _roles(job: JobSpec) -> list[tuple[str, str, Callable[[Path, str], None]]]:
    models = job.models
    check_diffusion = partial(_check_diffusion, checks_safety=models.safety_checker != "off")
    roles: list[tuple[str, str, Callable[[Path, str], None]]] = [
        ("models.diffusion", models.diffusion, check_diffusion),
        ("models.clip", models.clip, _check_clip),
        ("models.target", models.target, _check_classifier),
    ]
    roles += [(f"models.transfer.{place}", one, _check_classifier) for place, one in enumerate(models.transfer)]
    if models.oracle:
        roles.append(("models.oracle", models.oracle, _check_classifier))
    if models.judge:
        roles.append(("models.judge", models.judge, _check_clip))
    if models.guidance_decoder:
        roles.append(("models.guidance_decoder", models.guidance_decoder, check_decoder))
    for number, request in enumerate(job.requests):
        if request.diffusion:
            roles.append((f"requests.{number}.diffusion", request.diffusion, check_diffusion))
    return roles


def _pipeline_folder(address: str) -> Path | None:
    """The folder of a pipeline, if all of its configurations are here."""
    source = locate(address)
    if source.folder is None or (source.is_hub and not has_configurations(source.folder)):
        return None
    return source.folder


def _request_problems(job: JobSpec) -> list[str]:
    """Requests that do not go with their diffusion model."""
    problems = []
    for number, request in enumerate(job.requests):
        address = request.diffusion or job.models.diffusion
        if folder := _pipeline_folder(address):
            found = request_problems(job, request, folder, address)
            problems += [f"requests.{number}.{problem}" for problem in found]
    return problems


def find_artefact(address: str) -> Path | None:
    """The folder of a conditioning artefact, or None where there is none yet.

    Args:
        address: the artefact, a folder that holds one as `riskforge prepare` leaves it, or `zoo:NAME/PART`.

    Raises:
        JobError: no such zoo part, a folder with several artefacts, or a path that cannot be looked at.
    """
    if address.startswith("zoo:"):
        folder = _zoo_folder(address.removeprefix("zoo:").rstrip("/"))
        if not (folder / ARTEFACT_DOCUMENT).is_file():
            raise JobError(f"'{address}' is a model, not a conditioning artefact such as zoo:digits/conditioning")
        return folder
    try:
        folder = Path(address).expanduser()
        if folder.is_file():
            raise JobError(f"'{address}' is a file; give the folder of an artefact, or one that holds it")
        if (folder / ARTEFACT_DOCUMENT).is_file():
            return folder
        found = sorted(one.parent for one in folder.glob(f"conditioning-*/{ARTEFACT_DOCUMENT}"))
    except (OSError, RuntimeError, ValueError) as error:
        raise JobError(f"'{address}' cannot be looked at ({getattr(error, 'strerror', None) or error})") from None
    if len(found) > 1:
        raise JobError(f"'{address}' holds {len(found)} artefacts; name one of {', '.join(one.name for one in found)}")
    return found[0] if found else None


def missing_artefacts(job: JobSpec) -> list[str]:
    """What has to be prepared before a job can run, a line each.

    Raises:
        JobError: as `find_artefact`.
    """
    missing: dict[str, list[str]] = {}
    for request in job.requests:
        spec = request.conditioning
        if spec and spec.artefact and find_artefact(spec.artefact) is None:
            missing.setdefault(spec.artefact, []).append(request.name)
    return [
        f"conditioning: there is no artefact at '{address}' yet (request {', '.join(names)}); make it with `riskforge"
        f" prepare JOB --data PATH --output {address}`"
        for address, names in missing.items()
    ]


def _artefact_problems(number: int, request: RequestSpec, labels: list[str] | None) -> list[str]:
    """What an artefact that is there lacks for a request."""
    spec, where = request.conditioning, f"requests.{number}.conditioning.artefact"
    if spec is None or spec.artefact is None:
        return []
    try:
        folder = find_artefact(spec.artefact)
        fields = read_config(folder / ARTEFACT_DOCUMENT) if folder else {}
    except JobError as error:
        return [f"{where}: {error}"]
    if fields and labels and fields.get("classes") != labels:
        return [f"{where}: '{spec.artefact}' was prepared for other classes than the target's; prepare it anew"]
    predictor = fields.get("predictor")
    if spec.is_screened and isinstance(predictor, dict) and predictor.get("trained") is False:
        return [
            f"{where}: '{spec.artefact}' has no error predictor ({predictor.get('verdict')}); set screening: false, or"
            " prepare it from more images"
        ]
    return []


def _decoder_problems(job: JobSpec) -> list[str]:
    """Guided pipelines whose latents or images the guidance decoder does not have."""
    address = job.models.guidance_decoder
    decoder = locate(address).folder if address else None
    if decoder is None:
        return []
    guided = {one.diffusion or job.models.diffusion for one in job.requests if one.method_record.is_guided}
    problems = []
    for pipeline in sorted(guided):
        folder = _pipeline_folder(pipeline)
        if folder and (problem := decoder_problem(address or "", decoder, folder, pipeline)):
            problems.append(f"models.guidance_decoder: {problem}")
    return problems


def _label_problems(job: JobSpec) -> list[str]:
    """Classifiers that are compared must have the same classes in the same order."""
    problems: list[str] = []
    others = [(f"models.transfer.{place}", one) for place, one in enumerate(job.models.transfer)]
    others += [("models.oracle", job.models.oracle)] if job.models.oracle else []
    try:
        wanted = read_labels(job.models.target)
    except JobError as error:
        return [f"models.target: {error}"]
    for field, address in others:
        try:
            labels = read_labels(address)
        except JobError as error:
            problems.append(f"{field}: {error}")
            continue
        if wanted and labels and labels != wanted:
            problems.append(f"{field}: '{address}' has other classes than the target; names and order must be the same")
    return problems


def _zoo_folder(part: str) -> Path:
    parts = sorted(path.parent.relative_to(ZOO).as_posix() for path in ZOO.glob("*/*/*.json") if path.is_file())
    known = sorted({one for one in parts if _is_model(ZOO / one)})
    if part not in known:
        raise JobError(f"'zoo:{part}' is not in the zoo; it has {', '.join(known) or 'nothing'}" + nearest(part, known))
    return ZOO / part


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", PIPELINE_INDEX, ARTEFACT_DOCUMENT))


def _cached_snapshot(address: str) -> Path | None:
    """Folder of a hub id that was downloaded before, in whole or in part."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in (PIPELINE_INDEX, "config.json"):
            found = try_to_load_from_cache(address, name)
            if isinstance(found, str):
                return Path(found).parent
    except (HFValidationError, OSError) as error:
        raise JobError(f"'{address}' is not a folder, and no hub id either ({str(error).splitlines()[0]})") from None
    return None


def _loaded_files(folder: Path) -> list[Path]:
    """The files that are loaded and therefore decide the result: no pickles, no pictures, no notes, no variants."""
    parts = list(part_classes(folder)) if (folder / PIPELINE_INDEX).is_file() else []
    roots = [folder / part for part in parts] or [folder]
    found = {path for root in roots for pattern in (*_CONFIGURATION, _WEIGHTS) for path in root.rglob(pattern)}
    found |= {folder / PIPELINE_INDEX} if parts else set()
    variants = {where: weights_variant(where) for where in {path.parent for path in found}}
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not is_left_out(path, variants[path.parent])
    ]


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def target_labels(job: JobSpec) -> list[str]:
    """The class names of a job's target; a model of the hub is fetched for them."""
    labels = read_labels(job.models.target)
    if labels is None:
        try:
            resolve(job.models.target)
        except JobError as error:
            raise JobError([f"models.target: {problem}" for problem in error.problems]) from None
        labels = read_labels(job.models.target)
    assert labels is not None, "a resolved model has labels"
    return labels
