"""How a data set is read, for its card: lines of code that run in its folder."""

from __future__ import annotations

from engine.data.run.file_names import CLASS_MAP, FOLDER_LABELS, SURPLUS_LIST
from engine.data.run.shards import SHARDS
from engine.job.records import columns_of

# By the header, which names the files. Left to themselves, builders take a class called train for a part of the data.
FILES_LOADING = """## Loading

Run these lines in the folder of the data set.

```python
import os
from datasets import load_dataset

samples = load_dataset(os.getcwd(), split="train")
print(samples[0]["image"].size, samples[0]["label"], samples[0]["risk"])
```"""


PAIRS_LOADING = """## Loading

Each row is a sample beside the images that it is compared with: `start`, the real image that it began from, and `twin`,
the same noise, condition and start without guidance; null where a sample has none. Starts are real images, under the
licence of their data set. Run these lines in the folder of the data set.

```python
import os
from datasets import load_dataset

pairs = load_dataset(os.getcwd(), split="train")
for one in pairs:
    print(one["key"], one["class_name"], one["twin_psnr_db"], one["start"], one["twin"], one["image"].size)
```"""


# torchvision and timm number the folders that are there, which are not all classes where one has no image.
FOLDERS_LOADING = f"""

Left to themselves torchvision and timm number the folders that they find, in an order of their own. `{FOLDER_LABELS}`
(the label of every folder) and `{CLASS_MAP}` (all folders in the order of labels) give them the labels:

```python
import json
import os
import torchvision

label_of = json.load(open("{FOLDER_LABELS}", encoding="utf-8"))


class Folders(torchvision.datasets.ImageFolder):
    def find_classes(self, directory):
        return list(label_of), label_of


folder = Folders(os.getcwd(), allow_empty=True)
print(folder[0])
```

```python
import os
import timm.data

images = timm.data.create_dataset("folder", root=os.getcwd(), class_map="{CLASS_MAP}")
print(images[0])
```"""


def loading_section(extension: str, version: int) -> str:
    """How the shards of a run are read: what is rejected or beyond its quota is left out.

    Args:
        extension: of the images.
        version: schema version of the rows.
    """
    return f"""{_intro(extension)}

A run is closed with a list of the accepted samples that are beyond their quota, which nothing in a tar tells.

```python
import glob
import webdataset as wds

surplus = set(open("{SURPLUS_LIST}").read().split())
files = sorted(glob.glob("{SHARDS}/*.tar"))
samples = wds.WebDataset(files, shardshuffle=False).decode("pil")
samples = samples.select(lambda one: one["json"]["accepted"] and one["__key__"] not in surplus)
for image, label, record in samples.to_tuple("{extension}", "cls", "json"):
    print(record["key"], image.size, label, record["risk"])
```

```python
import os
from datasets import load_dataset

surplus = set(open("{SURPLUS_LIST}").read().split())
samples = load_dataset(os.getcwd(), split="train")
samples = samples.filter(lambda one, key: one["accepted"] and key not in surplus, input_columns=["json", "__key__"])
for one in samples:
    print(one["__key__"], one["cls"], one["json"]["risk"])
```

`{SHARDS}/_info.json` (timm) and `{SHARDS}/wids.json` count every image in the tars, also what these lines leave out.

{_rows("Every attempt, failed ones too,", version, '("accepted", "==", True), ("surplus", "==", False)')}"""


def merged_loading_section(extension: str, version: int) -> str:
    """How the shards of an export are read: everything in them was chosen."""
    return f"""{_intro(extension)}

```python
import glob
import webdataset as wds

files = sorted(glob.glob("{SHARDS}/*.tar"))
samples = wds.WebDataset(files, shardshuffle=False).decode("pil")
for image, label, record in samples.to_tuple("{extension}", "cls", "json"):
    print(record["key"], image.size, label, record["risk"])
```

```python
import os
from datasets import load_dataset

samples = load_dataset(os.getcwd(), split="train")
print(samples[0]["__key__"], samples[0]["cls"], samples[0]["json"]["risk"])
```

{_rows("Every sample", version, "")}"""


def _intro(extension: str) -> str:
    return f"""## Loading

The shards are plain WebDataset tars: `KEY.{extension}`, `KEY.json` (the columns before `batch_size`), `KEY.cls` (the
label). Run these lines in the folder of the data set."""


def _rows(which: str, version: int, conditions: str) -> str:
    scored = '("scored", "==", True)' if "scored" in columns_of(version) else '("status", "!=", "failed")'
    filters = ", ".join(filter(None, [scored, conditions, '("risk", ">", 2.0)']))
    return f"""{which} is a row of `metadata.parquet`; ask for scores among the scored ones:

```python
import pyarrow.parquet as pq

rows = pq.read_table("metadata.parquet", filters=[{filters}])
for row in rows.select(["key", "risk", "conformity", "kldb"]).to_pylist()[:10]:
    print(row)
```"""
