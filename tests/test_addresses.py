"""Addresses of models: located without a network, or refused with the remedy."""

import pytest

from engine.errors import JobError
from engine.models.addresses import locate, resolve
from engine.models.labels import read_labels


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("zoo:digits/clasifier", "did you mean 'digits/classifier'"),
        ("zoo:../../etc", "not in the zoo"),
        ("zoo:../zoo/digits/classifier", "not in the zoo"),
        ("/nowhere/at/all", "neither a folder nor a hub id"),
        ("owner/name\n", "neither a folder nor a hub id"),
        ("a/my--model", "not a hub id either"),
        ("models/sd.git", "not a hub id either"),
        ("~nobody-here/x", "cannot be accessed"),
        ("x" * 999, "cannot be accessed"),
        ("a\0b", "neither a folder nor a hub id"),
        ("tests/test_addresses.py", "is a file"),
    ],
)
def test_wrong_addresses_name_the_remedy(address, message, monkeypatch, request):
    """Typing errors are distinguished from hub ids that are not on this machine."""
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(JobError, match=message):
        locate(address)


def test_hub_id_that_is_not_here():
    """A hub id is located without a network, has no labels yet, and resolving it offline reports the reason."""
    assert locate("nobody/nothing-here").folder is None
    assert read_labels("nobody/nothing-here") is None
    with pytest.raises(JobError, match="could not be downloaded from the model hub"):
        resolve("nobody/nothing-here")
