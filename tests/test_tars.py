"""One way to read a tar, everywhere: the same members as tarfile where it is sound, and limits where it is hostile."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import open_run
from engine.data.images.decode import MAX_FILE_BYTES
from engine.data.run.shards import MAX_SAMPLE_BYTES, read_tar, tar_entries
from engine.data.stores.opening import open_store
from engine.data.tars import MAX_HEADER_BYTES, DamagedTarError, read_member, walk_tar
from engine.errors import CorruptShardError
from engine.report.render import write_report
from tests.conftest import REPOSITORY
from tests.corpus_cases import make_run
from tests.image_cases import DIGITS, EPS, bend, bomb, file_member, grey, header, padded, read, split, write_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0/"), min_size=1, max_size=40)
names = st.lists(texts, min_size=1, max_size=8).map("/".join).map(lambda name: name.strip("/") or "x")


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5), st.sampled_from(FORMATS[1:]))
def test_sound_archives_are_read_as_tarfile_reads_them(tmp_path_factory, members, form):
    """Names of any length and script, in GNU's and in pax's headers; contents byte for byte."""
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members, form)
    with tarfile.open(path) as tar:
        wanted = [(one.name, tar.extractfile(one).read()) for one in tar if one.isreg()]
    with path.open("rb") as file:
        assert [(one.name, read_member(file, one)) for one in walk_tar(file) if one.is_file] == wanted


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0, 1))
def test_bent_archives_end_with_a_reason(tmp_path_factory, changes, end):
    """Bytes that are changed or missing anywhere: members within the file, and no other error."""
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", [("é" * 90 + ".png", b"x" * 600), ("b.cls", b"1")])
    bent = bytearray(path.read_bytes())
    for place, value in changes:
        bent[int(place * (len(bent) - 1))] = value
    path.write_bytes(bent[: int(end * len(bent)) + 1])
    try:
        with path.open("rb") as file:
            assert all(one.offset + one.size <= len(bent) for one in walk_tar(file))
    except DamagedTarError as error:
        assert str(error)


def sparse_header(name: str, size: int) -> bytes:
    """GNU's old sparse format: no data, and a size."""
    block = bytearray(header(name, tarfile.GNUTYPE_SPARSE))
    block[483:495] = f"{size:011o}\0".encode()
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def pax(**records: str) -> bytes:
    """A pax header for the next member."""
    text = b""
    for key, value in records.items():
        body = f" {key.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
        text += str(length).encode() + body
    return header("x", tarfile.XHDTYPE, len(text)) + padded(text)


END = bytes(1024)
# Members in the place of an image; what is behind it of a size lies nowhere.
HOSTILE: dict[str, Callable[[str], bytes]] = {
    "a link to itself": lambda name: header(name, tarfile.SYMTYPE, link=name),
    "a link out": lambda name: header(name, tarfile.SYMTYPE, link="/etc/passwd"),
    "a hard link to itself": lambda name: header(name, tarfile.LNKTYPE, link=name),
    "a hard link out": lambda name: header(name, tarfile.LNKTYPE, link="../../etc/passwd"),
    "a hard link with a size": lambda name: header(name, tarfile.LNKTYPE, 2**33, "/etc/passwd"),
    "a device": lambda name: header(name, tarfile.CHRTYPE),
    "a block device": lambda name: header(name, tarfile.BLKTYPE),
    "a pipe": lambda name: header(name, tarfile.FIFOTYPE),
    "a folder": lambda name: header(name, tarfile.DIRTYPE),
    "sparse": lambda name: sparse_header(name, 2**33 - 1),
    "sparse in pax": lambda name: pax(GNU_sparse_size=str(2**40), GNU_sparse_name=name) + header(name),
    "huge": lambda name: header(name, size=2**40),
    "huge in pax": lambda name: pax(size=str(2**60)) + header(name),
    "negative": lambda name: header(name, size=-1),
    "of an unknown kind": lambda name: header(name, b"Z"),
    "a huge header": lambda name: header("x", tarfile.XHDTYPE, 2**40) + header(name),
    "a damaged header": lambda name: header("x", tarfile.XHDTYPE, 12) + padded(b"99 path=abc\n") + header(name),
    "a name without end": lambda name: header("x", tarfile.GNUTYPE_LONGNAME, 2**33),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_reported_in_others_tars(tmp_path, kind):
    """And what stands before them is used; nothing is followed, and nothing read that is not there."""
    path = write_tar(tmp_path / "a.tar", [("a.png", grey(0)), ("a.cls", b"3")])
    whole = path.read_bytes()[: 4 * 512]
    path.write_bytes(whole + HOSTILE[kind]("b.png") + header("b.cls", size=1) + padded(b"3") + END)
    used, reasons = split(read(tmp_path, DIGITS))
    assert used == {"a.tar/a.png": 3} and reasons
    assert "passwd" not in "".join(reasons.values())


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_refused_in_shards(tmp_path, kind):
    """By whatever lists members or reads them."""
    path = tmp_path / "a.tar"
    path.write_bytes(HOSTILE[kind]("b.png") + END)
    for reader in (tar_entries, read_tar):
        with pytest.raises(CorruptShardError, match=r"a\.tar"):
            list(reader(path))


def hole(path: Path, start: bytes, size: int, end: bytes = END) -> Path:
    """A file with much nothing in it, of which a disk holds a few kB."""
    with path.open("wb") as file:
        file.write(start)
        file.seek(size, os.SEEK_CUR)
        file.write(end)
    return path


def test_sizes_that_a_file_has_are_limited_too(tmp_path):
    """A sparse file on disk holds what its headers claim: members, headers, and zeros after the end."""
    huge = 2**36
    hole(tmp_path / "a.tar", header("a.png", size=huge), huge)
    used, reasons = split(read(tmp_path / "a.tar", DIGITS))
    assert not used and list(reasons) == ["a.tar/a.png"]
    labelled = header("a.cls", size=1) + padded(b"3") + header("a.png", size=MAX_FILE_BYTES + 512)
    hole(tmp_path / "a.tar", labelled, MAX_FILE_BYTES + 512)
    assert "up to 256 MB are read" in split(read(tmp_path / "a.tar", DIGITS))[1]["a.tar/a.png"]
    hole(tmp_path / "c.tar", header("a.png", size=MAX_SAMPLE_BYTES + 1), MAX_SAMPLE_BYTES + 512)
    hole(tmp_path / "d.tar", header("x", tarfile.XHDTYPE, MAX_HEADER_BYTES + 1), huge)
    hole(tmp_path / "e.tar", END, huge)
    for name, text in (("c", "up to"), ("d", "a header of"), ("e", "after its end")):
        with pytest.raises(CorruptShardError, match=text):
            list(tar_entries(tmp_path / f"{name}.tar"))


def test_what_is_whole_before_a_cut_is_read(tmp_path):
    """Also where the file ends with the last byte of a member."""
    path = write_tar(tmp_path / "a.tar", [("a.png", bytes(512)), ("b.png", bytes(1024))])
    whole = path.read_bytes()
    for end, names in ((3 * 512 + 1024, ["a.png", "b.png"]), (3 * 512 + 1023, ["a.png"]), (2 * 512, ["a.png"])):
        path.write_bytes(whole[:end])
        members: list[str] = []
        with path.open("rb") as file, pytest.raises(DamagedTarError, match="cut short"):
            members += (member.name for member in walk_tar(file))
        assert members == names


def test_an_archive_behind_another_is_reported(tmp_path):
    """Readers stop at the end of the first, without a word."""
    path = write_tar(tmp_path / "a.tar", [("a.png", grey(0)), ("a.cls", b"3")])
    path.write_bytes(path.read_bytes() * 2)
    used, reasons = split(read(path, DIGITS))
    assert list(used) == ["a.tar/a.png"] and "two archives" in reasons["a.tar"]


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz"])
def test_a_packed_tar_is_reported(tmp_path, packer):
    with tarfile.open(tmp_path / "a.tar", f"w:{packer}") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert "unpack it" in split(read(tmp_path, DIGITS))[1]["a.tar"]


# A foreign run --------------------------------------------------------------------------------------------


IN_RUNS = HOSTILE | {
    "EPS": file_member(EPS),
    "178 megapixels": lambda name: file_member(bomb())(name),
    "no image": file_member(b"words"),
    "a bad chunk": file_member(grey(3)[:-20] + b"\xff" * 20),
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Path:
    """Runs commands in a process with little memory and no programs to start; prints their exit codes."""
    path = tmp_path_factory.mktemp("commands") / "commands.py"
    path.write_text(
        "import contextlib, io, json, resource, subprocess, sys\n"
        "from engine import cli\n"
        "import engine.report.render, engine.data.run.verify\n"
        "import engine.data.reading.inspection, engine.data.reading.export\n"
        "def refuse(*a, **k): raise AssertionError('a program was started')\n"
        "subprocess.Popen = refuse\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 900 * 2**20,) * 2)\n"
        "results = []\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['riskforge', *arguments]\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try: cli.main(); code = 0\n"
        "        except SystemExit as end: code = end.code or 0\n"
        "    results.append([code, out.getvalue() + err.getvalue()])\n"
        "print(json.dumps(results))\n"
    )
    return path


def test_a_hostile_run_gives_a_report_and_reported_damage(tmp_path, commands):
    """`report`, `inspect`, `verify` and `export`, in bounded memory and without a traceback, for every member."""
    sound, lines = make_run(tmp_path / "sound", count=1, name="h"), list[list[str]]()
    for number, make in enumerate(IN_RUNS.values()):
        run = shutil.copytree(sound, tmp_path / f"run-{number}")
        bend(run, make)
        output = str(tmp_path / f"out-{number}")
        lines += [["report", str(run)], ["inspect", str(run)], ["verify", str(run)],
                  ["export", str(run), "--output", output]]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(commands), json.dumps(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    for (name, *_), (code, text) in zip(lines, results, strict=True):
        assert "Traceback" not in text and "program was started" not in text, text
        assert code == 0 if name == "report" else code in (0, 1, 2), (name, code, text)
        if name in ("verify", "export"):
            assert code in (1, 2) and "h-0" in text, (name, text)


@pytest.mark.parametrize("data", [EPS, bomb(), b"words"], ids=["EPS", "bomb", "words"])
def test_readers_name_a_hostile_image(tmp_path, data):
    """In Python too: `to_torch`, and `to_webdataset`, whose library would open anything."""
    run = make_run(tmp_path / "run", count=2, name="h")
    bend(run, file_member(data))
    corpus = open_run(str(run))
    samples = corpus.to_torch()
    for read_all in (lambda: [samples[number] for number in range(len(samples))], lambda: list(corpus.to_webdataset())):
        with pytest.raises(CorruptShardError, match="h-000"):
            read_all()


def test_the_report_of_a_sound_run_has_its_images(tmp_path):
    """What was bent above is read where it is whole."""
    run = make_run(tmp_path / "run", count=1, name="h")
    write_report(open_store(str(run)))
    assert (run / "report.html").read_text().count("data:image/png;base64") > 5


ALLOWED = {"engine/data/images/decode.py": {"PIL.Image.open"}}
FORBIDDEN = ("PIL.Image.open", "Image.open", "tarfile.open", "TarFile.open", "tarfile.TarFile")


def test_no_module_opens_images_or_tars_in_a_way_of_its_own():
    """`engine.data.images.decode` and `engine.data.tars` alone have the limits."""
    for path in sorted((REPOSITORY / "engine").rglob("*.py")):
        place = path.relative_to(REPOSITORY).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            is_own = any(text == one or text.endswith(f".{one}") for one in FORBIDDEN)
            assert not is_own or text in ALLOWED.get(place, ()), f"{place}: {text}"
            assert not text.endswith((".extractfile", ".extractall")), f"{place}: {text}"
