"""One thread for every test: a tiny model's threads only wait for each other, and bits stay the same."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch and the hub are imported

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.processes import ENVIRONMENT  # noqa: E402
from tests.toy import make_world  # noqa: E402
from tests.warm_python import warm_python  # noqa: E402

torch.set_num_threads(1)
LONGEST = ["recipes", "ladder", "train_emdr2", "trainers"]  # first, so that two workers end at one time


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of the toy world; nothing in it may be changed."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The folder of a `python` that has the libraries loaded, for the commands of recipes."""
    with warm_python(tmp_path_factory.mktemp("warm") / "bin", ENVIRONMENT) as folder:
        yield folder
