"""How finished parts become a zoo's folder: copied, every content stored once, with a list of checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path


def unfinished(build_folder: Path, names: Iterable[str]) -> list[str]:
    """The parts that are not complete: some of the others may share files with them."""
    return [name for name in names if not marker(build_folder, name).exists()]


def marker(build_folder: Path, name: str) -> Path:
    """The file that is there when a stage is done."""
    return build_folder / "done" / name.replace("/", "-")


def publish_parts(build_folder: Path, output: Path, names: Iterable[str]) -> None:
    """Copy exported parts to `output`, each whole or not at all, replacing what is there."""
    for name in names:
        arriving = output / f".{name}"
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.copytree(build_folder / "export" / name, arriving)
        shutil.rmtree(output / name, ignore_errors=True)
        arriving.rename(output / name)


def unwritable(folder: Path) -> str:
    """Why nothing can be written into a folder, which is made where it is missing; empty where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"


def part_files(zoo: Path) -> list[Path]:
    """The files of all parts, in order; not those beside them."""
    return [path for path in sorted(zoo.rglob("*")) if path.is_file() and path.parent != zoo]


def store_once(zoo: Path) -> None:
    """Make weights whose bytes an earlier part has a relative link to those: the pipelines share an autoencoder.

    So with the tokenizers of pipelines. Libraries read a link as the file; a wheel holds the bytes twice. Other small
    files stay, so that most parts stand alone.
    """
    first: dict[str, Path] = {}
    for path in part_files(zoo):
        is_shared = path.suffix == ".safetensors" or path.parent.name == "tokenizer"
        if is_shared and not path.is_symlink():
            original = first.setdefault(_digest(path), path)
            if original is not path:
                path.unlink()
                path.symlink_to(os.path.relpath(original, path.parent))


def write_checksums(zoo: Path) -> None:
    """List the checksums of all parts in `zoo/SHA256SUMS`."""
    for path in part_files(zoo):
        path.chmod(0o644)
    lines = [f"{_digest(path)}  {path.relative_to(zoo)}\n" for path in part_files(zoo)]
    (zoo / "SHA256SUMS").write_text("".join(lines))


def stored_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, a link counting nothing."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
