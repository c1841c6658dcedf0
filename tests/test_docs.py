"""The documentation is true: links lead somewhere, code compiles, jobs are valid, commands exist with their options."""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
import yaml

from engine.cli import app
from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec, RequestSpec
from engine.studies.experiments.parsing import validated
from engine.studies.experiments.registry import STUDIES
from engine.studies.loop.parsing import parse_loop
from tests.conftest import REPOSITORY
from tools import docs

PAGES = sorted(
    [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *(REPOSITORY / "docs").glob("*.md"),
        *REPOSITORY.glob("engine/zoo/*/README.md"),
    ]
)
EXAMPLES = {f"tests.extensions.{path.stem}" for path in (REPOSITORY / "tests/extensions").glob("*.py")}
IDS = [str(page.relative_to(REPOSITORY)) for page in PAGES]
# A job that the fragments of the pages are parts of.
BASE: dict[str, Any] = {
    "name": "base",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion",
        "clip": "zoo:digits/clip",
        "target": "zoo:digits/classifier",
        "oracle": "zoo:digits/oracle",
    },
    "requests": [{"name": "all", "method": "prompt", "classes": "all", "count": 1}],
    "output": {"uri": "runs/base"},
}


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """First line and content of the fenced blocks of some languages."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if found[1] in languages:
            yield page.read_text(encoding="utf-8").count("\n", 0, found.start()) + 2, found[2]


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# Links ---------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files, pictures and headings; addresses of the web are only looked at."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"https?://[\w.-]+/?", link):
            continue
        place, _, anchor = unquote(link).partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists() and target.is_relative_to(REPOSITORY), f"{page.name}: {link}"
        if anchor:
            assert target.suffix == ".md" and anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    """A page that nobody can find is not there."""
    seen, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        linked = [
            (page.parent / one.partition("#")[0]).resolve() for one in re.findall(r"\]\(([^)\s]+)\)", prose(page))
        ]
        waiting += [one for one in linked if one.suffix == ".md" and one.is_file() and one not in seen]
    assert set((REPOSITORY / "docs").glob("*.md")) <= seen


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_are_there(page: Path) -> None:
    """`engine/x.py`, `jobs/y.yaml`, `tests/test_z.py::test`, `tools/...` in the text and in commands."""
    for name in re.findall(r"(?<![\w/.-])((?:engine|jobs|tests|tools)/[\w./-]+\.(?:py|yaml|md))", page.read_text()):
        assert (REPOSITORY / name).is_file(), f"{page.name}: {name}"


# Blocks of code ------------------------------------------------------------------------------------------------------


def test_every_block_of_python_compiles() -> None:
    """And imports nothing of this project that is not there."""
    num_blocks = 0
    for page in PAGES:
        for line, code in blocks(page, "python"):
            tree = compile(code, f"{page}:{line}", "exec", ast.PyCF_ONLY_AST)
            num_blocks += 1
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "engine":
                    # What an example adds is in a file of the tests.
                    example = f"tests.extensions.{node.module.rpartition('.')[2]}"
                    name = example if example in EXAMPLES else node.module
                    module = __import__(name, fromlist=["_"])
                    assert all(hasattr(module, one.name) for one in node.names), f"{page.name}:{line}"
    assert num_blocks >= 3


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_of_yaml_is_a_job_or_a_part_of_one(page: Path) -> None:
    """A part is merged into a job that is valid: a section of it, a list of requests, or one request.

    A loop job is whole.
    """
    for line, text in blocks(page, "yaml"):
        part = yaml.safe_load(text)
        try:
            if isinstance(part, dict) and part.get("study") in STUDIES:
                validated(STUDIES[part["study"]].spec_class(), part)
            elif "study" in part:
                parse_loop(part, lambda path: {})
            else:
                parse_job(whole_job(part))
        except JobError as error:
            pytest.fail(f"{page.name}:{line}: {error}")


def whole_job(part: Any) -> dict[str, Any]:
    """A job that a block stands in."""
    if isinstance(part, list):
        return BASE | {"requests": part}
    if part.keys() <= RequestSpec.model_fields.keys() and not part.keys() <= JobSpec.model_fields.keys():
        return BASE | {"requests": [BASE["requests"][0] | part]}
    return BASE | part


# Commands ------------------------------------------------------------------------------------------------------------

# Typer brings its own click, or takes the one that is installed.
COMMANDS: Any = typer.main.get_command(app)
UsageError: Any = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")


def command_lines(page: Path) -> Iterator[str]:
    """The shell commands of a page, one by one, without comments; also those of a `ray exec` and those with outputs."""
    shown = [
        "\n".join(
            re.sub(r"\\?\n> ", " ", command) for command in re.findall(r"^\$ (.*(?:\n> .*)*)", text, re.MULTILINE)
        )
        for _, text in blocks(page, "console")
    ]
    for text in [*(text for _, text in blocks(page, "bash")), *shown]:
        joined = text.replace("\\\n", " ")
        for line in joined.splitlines():
            plain = re.sub(r"(^|\s)#.*", "", line)
            quoted = re.findall(r'"([^"]*riskforge [^"]*)"', plain)
            plain = re.sub(r'"[^"]*riskforge [^"]*"', "X", plain)
            yield from (part for one in (plain, *quoted) for part in re.split(r"&&|\|\||;|\||\buntil\b|\bdo\b", one))


def inline_commands(page: Path) -> Iterator[str]:
    """Commands within the text that are whole: `riskforge verify RUN`."""
    found = re.findall(r"`(riskforge [^`]+)`", re.sub(r"\n", " ", prose(page)))
    yield from (one for one in found if "[" not in one and "..." not in one)


def arguments_of(command: str) -> list[str] | None:
    """What a command gives to `riskforge`, or None where it calls something else."""
    # What others run may have quotes around what separates commands.
    words = shlex.split(command.replace("$K", "3")) if "riskforge" in command else []
    while words and re.fullmatch(r"uv|run|--no-sync|[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words[1:] if words and Path(words[0]).name == "riskforge" else None


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_exists_with_its_options(page: Path) -> None:
    """Each is read by the real command line, which runs nothing; jobs of the repository that it names are there."""
    for command in [*command_lines(page), *inline_commands(page)]:
        if (arguments := arguments_of(command)) is None:
            continue
        try:
            check_command(arguments)
        except UsageError as error:
            pytest.fail(f"{page.name}: {command.strip()}: {error.format_message()}")


def check_command(arguments: list[str]) -> None:
    """Read arguments as the command line does.

    Raises:
        UsageError: no such command or option, a value that it does not take, or an argument too many.
    """
    if arguments and arguments[0].startswith("-"):
        assert arguments in (["--help"], ["--version"])
        return
    command = COMMANDS.commands.get(arguments[0])
    if command is None:
        raise UsageError(f"there is no command {arguments[0]}")
    # In running text, the name alone is enough.
    if len(arguments) > 1:
        command.make_context(arguments[0], arguments[1:], parent=COMMANDS.make_context("riskforge", ["schema"]))


def test_the_check_of_commands_sees_what_is_wrong() -> None:
    """An option that is not there, a choice that is none, a command of another program."""
    for wrong in ("run JOB --nothing", "run JOB --executor cloud", "fly RUN", "verify RUN MORE"):
        with pytest.raises(UsageError):
            check_command(wrong.split())
    check_command(["run", "JOB", "--max_duration", "8h"])
    assert arguments_of("uv run riskforge schema ") == ["schema"] and arguments_of("ray up deploy/cluster.yaml") is None


def test_every_command_is_documented_and_has_help() -> None:
    """The table of `docs/commands.md` names each; each command and option says what it is for."""
    page = (REPOSITORY / "docs/commands.md").read_text()
    for name, command in COMMANDS.commands.items():
        assert f"`riskforge {name}" in page, name
        assert command.help, name
        for option in command.params:
            assert getattr(option, "help", None) or option.name == "help", f"{name} {option.name}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_scripts_of_commands_are_there(page: Path) -> None:
    """`python tools/x.py`, `python -m tools.x`."""
    for command in command_lines(page):
        for script in re.findall(r"python3? (tools/\S+\.py)", command):
            assert (REPOSITORY / script).is_file(), command
        for module in re.findall(r"python3? -m (tools\.\S+)", command):
            assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), command


# Pages that are made from the code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", docs.PAGES)
def test_pages_made_from_the_code_are_up_to_date(name: str) -> None:
    """Every field of the job and of the metadata, as the code has it today."""
    assert (docs.DOCS / name).read_text(encoding="utf-8") == docs.PAGES[name](), "run `python tools/docs.py`"


def test_the_reference_has_every_key() -> None:
    """Also of sections that are added later."""
    page = docs.job_page()
    models = {value.annotation for _, section in docs.SECTIONS for value in section.model_fields.values()}
    missing = [one for one in models if isinstance(one, type) and hasattr(one, "model_fields")]
    assert {section for _, section in docs.SECTIONS} >= set(missing)
    for _, section in docs.SECTIONS:
        assert all(f"| `{name}` |" in page for name in section.model_fields)


# Pages for new readers -----------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    """For somebody who has never heard of KLDB: at most 900 words."""
    assert len((REPOSITORY / "README.md").read_text().split()) <= 900


def test_the_architecture_page_is_short_and_names_every_package() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    assert len(text.splitlines()) <= 120
    for package in (REPOSITORY / "engine").glob("*/__init__.py"):
        assert f"`{package.parent.name}/`" in text, package.parent.name
