"""The public face: what `import engine` offers."""

import importlib
import subprocess
import sys

import pytest

import engine
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("name", engine.__all__)
def test_each_name_is_there(name):
    """The lazy table names the module that defines it; a typing stub that has moved would be seen by mypy alone."""
    value = getattr(engine, name)
    assert value is getattr(importlib.import_module(engine._MODULES[name]), name)
    assert name in dir(engine)


def test_no_other_name_is_there():
    with pytest.raises(AttributeError, match="no attribute 'opne_run'"):
        engine.opne_run  # noqa: B018
    assert engine._MODULES.keys() == set(engine.__all__)


@pytest.mark.parametrize("name", engine.__all__)
def test_each_name_is_documented(name):
    assert f"`engine.{name}`" in (REPOSITORY / "docs/extending.md").read_text()


def test_importing_the_package_imports_nothing_else():
    code = "import sys, engine; sys.exit(', '.join(name for name in sys.modules if name.startswith('engine.')) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_digits_keep_their_path():
    """The tutorial imports the composed digits from `engine.digits`."""
    from engine import digits

    assert digits.compose_seen and len(digits.CLASS_NAMES) == 10
