"""Imports that are put off: what code in the block sees, and what is left after it. `colorsys` stands for them."""

import importlib.util
import sys
from collections.abc import Iterator

import pytest

from engine.models.library_imports import deferring

NAME = "colorsys"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The module is not imported before and after."""
    before = sys.modules.pop(NAME, None)
    yield
    sys.modules.pop(NAME, None)
    if before:
        sys.modules[NAME] = before


def test_an_import_that_nobody_uses_does_not_happen() -> None:
    """It is installed for whoever asks, and `inspect`, which looks at the file of every module, imports nothing."""
    with deferring((NAME,)):
        import colorsys

        assert importlib.util.find_spec(NAME) is not None
        assert not hasattr(colorsys, "__file__")
    assert NAME not in sys.modules


def test_what_is_used_later_is_the_module() -> None:
    """Through the name that was bound in the block, too."""
    with deferring((NAME,)):
        import colorsys
    assert colorsys.rgb_to_hls(1, 1, 1) == sys.modules[NAME].rgb_to_hls(1, 1, 1)
    assert sys.modules[NAME].__file__


def test_what_is_used_in_the_block_is_imported_there() -> None:
    with deferring((NAME,)):
        from colorsys import rgb_to_hls
    assert rgb_to_hls is sys.modules[NAME].rgb_to_hls


def test_what_is_not_installed_stays_so_and_what_is_imported_stays() -> None:
    import colorsys

    with deferring((NAME, "no_such_library")):
        assert sys.modules[NAME] is colorsys and "no_such_library" not in sys.modules
    assert sys.modules[NAME] is colorsys


def test_a_part_of_a_package_is_imported_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users' own code imports parts of SciPy's statistics."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wsgiref"]:
        monkeypatch.delitem(sys.modules, name)
    with deferring(("wsgiref",)):
        from wsgiref.headers import Headers
    assert sys.modules["wsgiref"].headers.Headers is Headers
