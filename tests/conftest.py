"""One thread, because the models are tiny and test processes run side by side; slow tests; and
a garbage collector that does not look through all that was imported again and again."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.slow import slow_tests

torch.set_num_threads(1)


def named_whole(config: pytest.Config) -> bool:
    """Whether whole files were asked for, so that an entry that matches nothing is an error."""
    return not any("::" in argument for argument in config.args)


@pytest.hookimpl(tryfirst=True)  # before those that -m and -k name are chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ids = {item.nodeid.removeprefix("tests/"): item for item in items}
    slow, unused = slow_tests(ids)
    if unused and named_whole(config):
        raise pytest.UsageError(f"tests/slow.py names what is not there: {sorted(unused)}")
    for name, why in slow.items():
        ids[name].add_marker(pytest.mark.slow(why))


def pytest_collection_finish() -> None:
    """A tenth of a run was collections: captures make many objects, and few of them are garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
