"""One thread for every test: a tiny model's threads only wait for each other, and bits stay the same."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch  # noqa: E402

torch.set_num_threads(1)
