"""GPU tests: they fail, not skip, without a GPU; `--shard i/n` runs every n-th of them."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="i/n: run tests i, i + n, i + 2n, ...")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent  # the hook sees the items of every folder
    mine = [item for item in items if here in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
    first, step = map(int, config.getoption("--shard").split("/"))
    for item in set(mine) - set(mine[first::step]):
        items.remove(item)


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "GPU tests need an H100 or H200"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "4")))
