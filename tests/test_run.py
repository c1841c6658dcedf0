"""The main job from end to end: real models, real Ray, real files, a real kill; what is stored is what was promised."""

import io
import json
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
import yaml

from engine.data.images.encoding import DIGITAL_SOURCE_TYPE
from engine.data.run.shards import read_shard
from engine.job.plan import class_prompt
from engine.job.records import check_record
from engine.models.addresses import resolve
from tests import commands
from tests.conftest import REPOSITORY
from tests.strike import struck

pytestmark = pytest.mark.slow

CHANGES = {
    "requests.0.count": 6,
    "requests.0.twin": True,
    "requests.1.count": 6,
    "requests.2.count": 1,
    "sampling.num_inference_steps": 15,
    "output.samples_per_shard": 8,
}

# Of the median KLDB without guidance.
MAX_GUIDED_SHARE = 0.3


def riskforge(*arguments):
    """What the command shows when a user runs it; it must work."""
    done = commands.run(*arguments, folder=REPOSITORY)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The quickstart, smaller."""
    path = tmp_path_factory.mktemp("job") / "small.yaml"
    raw = yaml.safe_load((REPOSITORY / "jobs/quickstart.yaml").read_text())
    for place, value in CHANGES.items():
        *parents, last = place.split(".")
        inner = raw
        for parent in parents:
            inner = inner[int(parent)] if parent.isdigit() else inner[parent]
        inner[last] = value
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """The small quickstart, made by a thread without interruption."""
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert "report.html" in riskforge("run", job, "--output", output, "--executor", "local", "--workers", 1)
    return output


def tars(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("shards/*.tar"))}


def twins(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("twins/*.tar"))}


def samples(output: Path):
    return [sample for path in sorted(output.glob("shards/*.tar")) for sample in read_shard(path)]


def test_the_output_is_complete(finished):
    """All files of the contract, shards numbered without gaps, every attempt in the metadata, types as promised."""
    names = {path.name for path in finished.iterdir()}
    assert {"shards", "metadata.parquet", "manifest.json", "README.md", "report.html", "_SUCCESS", "_state"} <= names
    assert list(tars(finished)) == [f"quickstart-{number:06d}.tar" for number in range(5)]
    rows = pyarrow.parquet.read_table(finished / "metadata.parquet").to_pylist()
    assert len(rows) == 6 + 6 + 20 and {row["status"] for row in rows} == {"ok"}
    assert all(row["worker"] and row["sha256"] and row["batch_size"] == 16 for row in rows)
    stored = samples(finished)
    assert [key for key, *_ in stored] == [row["key"] for row in rows]
    for key, data, record, label in stored:
        check_record(record)
        assert record["key"] == key and record["class_index"] == label
        image = PIL.Image.open(io.BytesIO(data))
        assert image.size == (32, 32) and DIGITAL_SOURCE_TYPE in str(image.info["XML:com.adobe.xmp"])


def test_guidance_is_recorded_and_seeds_are_shared(finished):
    """A boundary sample and its prompt-only twin have one seed, one subset, and other pictures."""
    records = [(record, data) for _, data, record, _ in samples(finished)]
    guided = [one for one in records if one[0]["request"] == "between"]
    plain = [one for one in records if one[0]["request"] == "between-plain"]
    assert [one["seed"] for one, _ in guided] == [one["seed"] for one, _ in plain]
    assert all(one["guided_steps"] == 5 and one["nonfinite_gradients"] == 0 for one, _ in guided)
    assert all(one["guided_steps"] == 0 for one, _ in plain)
    assert all(one["kldb_classes"] == [3, 8] and sum(one["soft_label"]) == 1 for one, _ in guided + plain)
    assert all(first != second for (_, first), (_, second) in zip(guided, plain, strict=True))
    stored = [sample for path in sorted(finished.glob("twins/*.tar")) for sample in read_shard(path)]
    assert [(key, image) for key, image, _, _ in stored] == [
        (one["key"], image) for (one, _), (_, image) in zip(guided, plain, strict=True)
    ]
    closest, plainest = (np.median([one["kldb"] for one, _ in some]) for some in (guided, plain))
    assert closest <= MAX_GUIDED_SHARE * plainest


def test_plain_transformers_gives_the_stored_scores(finished):
    """Whoever decodes the files and scores them without this project gets the same numbers, to 1e-4."""
    import transformers

    stored = samples(finished)
    images = [PIL.Image.open(io.BytesIO(data)) for _, data, _, _ in stored]
    labels = torch.tensor([label for *_, label in stored])
    records = [record for _, _, record, _ in stored]

    def log_p(address, scale=True):
        model = transformers.AutoModelForImageClassification.from_pretrained(resolve(address)).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(resolve(address), backend="pil")
        with torch.no_grad():
            logits = model(**processor(images, return_tensors="pt")).logits
        # From the file: transformers 5 keeps this field out of its configuration objects.
        temperature = json.loads((resolve(address) / "config.json").read_text())["temperature"]
        return (logits / temperature if scale else logits).log_softmax(1)

    def close(name, values):
        assert torch.allclose(torch.tensor([one[name] for one in records]), values, atol=1e-4), name

    target = log_p("zoo:digits/classifier")
    subsets = torch.tensor([one["kldb_classes"] for one in records])
    close("risk", -target.gather(1, labels[:, None])[:, 0])
    close("kldb", -np.log(2) - target.gather(1, subsets).mean(1))
    close("entropy", -(target.exp() * target).sum(1))
    assert [one["predicted_class"] for one in records] == target.argmax(1).tolist()
    assert [one["is_error"] for one in records] == (target.argmax(1) != labels).tolist()
    transfer = log_p("zoo:digits/classifier-b")
    expected = -transfer.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(torch.tensor([one["transfer"][0]["risk"] for one in records]), expected, atol=1e-4)
    oracle = log_p("zoo:digits/oracle", scale=False)
    assert [one["oracle_class"] for one in records] == oracle.argmax(1).tolist()

    folder = resolve("zoo:digits/clip")
    clip, processor = transformers.CLIPModel.from_pretrained(folder), transformers.CLIPProcessor.from_pretrained(folder)
    names = [
        transformers.AutoConfig.from_pretrained(resolve("zoo:digits/classifier")).id2label[one] for one in range(10)
    ]
    texts = [class_prompt(name) for name in names]
    with torch.no_grad():
        # Plain CLIP's logits are cosines times its own scale.
        cosines = clip(**processor(text=texts, images=images, return_tensors="pt", padding=True)).logits_per_image
    close("conformity", (cosines / clip.logit_scale.exp()).gather(1, labels[:, None])[:, 0].detach())


def test_foreign_readers_open_the_shards(finished, tmp_path):
    """`webdataset` and Hugging Face `datasets`, with nothing of this project."""
    import datasets
    import webdataset

    urls = [str(path) for path in sorted(finished.glob("shards/*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(read) == 32 and read[0]["png"].size == (32, 32) and read[0]["json"]["request"] == "between"
    loaded = datasets.load_dataset("webdataset", data_files=urls, split="train", cache_dir=str(tmp_path))
    assert len(loaded) == 32 and loaded[0]["json"]["kldb_classes"] == [3, 8] and loaded[0]["png"].size == (32, 32)


def test_a_second_run_does_nothing_and_says_so(finished, job, call):
    """No model is loaded and no byte changes."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    code, out, _ = call("run", job, "--output", finished)
    assert code == 0 and "nothing to do" in out.lower()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_changed_job_is_refused_with_the_difference(finished, job, call):
    """Another guidance scale would mix two data sets; the message names the field and both values."""
    code, _, err = call("run", job, "--output", finished, "--set", "sampling.guidance_scale=5")
    assert code == 2 and "sampling.guidance_scale: 3.0 -> 5.0" in err
    assert "--resume overwrite" in err and "--output" in err
    assert (finished / "_SUCCESS").exists()


def test_killed_and_resumed_equals_uninterrupted(finished, job, tmp_path):
    """SIGKILL of a thread when two tars are published and a third is about to be; resumed by two actors, the tar bytes
    are the clean run's."""
    output = tmp_path / "killed"
    local = ("--executor", "local", "--workers", 1)
    process = struck(signal.SIGKILL, "os.link", "*-000002.tar", 1, "run", job, "--output", output, *local)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "_SUCCESS").exists() and len(tars(output)) == 2 < len(tars(finished))
    riskforge("run", job, "--output", output, "--executor", "ray", "--workers", 2)
    assert tars(output) == tars(finished) and twins(output) == twins(finished) and len(twins(finished)) == 1
    assert (output / "_SUCCESS").exists()


def test_grown_counts_extend_and_keep_what_is_there(finished, job, call, tmp_path):
    """More of a finished run: old shards keep their bytes, new ones follow, the metadata covers both."""
    import shutil

    output = tmp_path / "grown"
    shutil.copytree(finished, output)
    before = tars(output)
    code, _, err = call("run", job, "--output", output, "--executor", "local", "--set", "requests.0.count=10")
    assert code == 0, err
    after = tars(output)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    assert pyarrow.parquet.read_metadata(output / "metadata.parquet").num_rows == 36
    assert json.loads((output / "manifest.json").read_text())


def test_worker_refuses_what_the_machine_lacks(job, call, tmp_path):
    """xformers on a CPU is refused with the reason, not after an hour and not with a traceback."""
    wanted = ("--set", "runtime.attention=xformers", "--set", "runtime.device=cpu")
    code, _, err = call("run", job, "--output", tmp_path / "x", *wanted)
    assert code == 2 and "runtime.attention: 'xformers' has no kernels for a CPU" in err
    assert "Traceback" not in err
