"""Which tests share a process with `--dist loadgroup`."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those of a file, for its fixtures, and all engine tests, for the servers of the session."""
    if not config.pluginmanager.hasplugin("xdist"):  # which defines the mark
        return
    for item in items:
        of_engine = item.get_closest_marker("engine") is not None
        item.add_marker(pytest.mark.xdist_group("engine" if of_engine else item.path.stem))
