"""Which transport a run gets, and what is refused before anything starts."""

import pytest

from distca import transports
from distca.errors import SettingsError
from distca.transports import choose_transport, refuse_transport


@pytest.mark.parametrize(("workers", "chosen"), [(1, "pairs"), (16, "pairs"), (17, "group"), (512, "group")])
def test_auto_goes_by_the_number_of_workers(workers, chosen):
    assert choose_transport("auto", workers) == chosen


@pytest.mark.parametrize("wanted", ["pairs", "group", "nixl"])
def test_what_is_asked_for_is_taken(wanted):
    assert choose_transport(wanted, 3) == choose_transport(wanted, 300) == wanted


def test_nixl_without_its_package_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(transports, "NIXL_PACKAGES", ("nixl_that_is_not_there",))
    with pytest.raises(SettingsError, match=r"pip install 'distca\[nixl\]'"):
        refuse_transport("nixl")
    refuse_transport("group")
