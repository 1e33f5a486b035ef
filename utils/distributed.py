"""
Devices: what runs where, and what has a gradient. `accelerate launch` starts one process a device.

The rule for gradients across devices, used by every trainer here: each device computes the loss of the
*global* batch, with its own rows live and all other rows constant. Then gradients are *summed* over devices.
That is exactly the gradient of the full batch on one device. trap: DistributedDataParallel takes the mean
instead, which is 1/W of the true gradient on W devices. DPR and nanoDPR train with that factor, GC-DPR always
with 1/8 (see `gradient_scale` in config/train_dpr_nq.yaml).

B rows of this device · W devices · D dimensions
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


def world():
    """Return (rank, number of devices); (0, 1) outside a process group."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# ---------------------------------------------------------------- gradients
def gather_rows(x_BD):
    """
    Gather [B, D] of each of W devices: [W*B, D] on each, in device order.

    Only this device's own rows have a gradient.
    """
    rank, devices = world()
    if devices == 1:
        return x_BD
    rows = [torch.empty_like(x_BD, requires_grad=False) for _ in range(devices)]
    dist.all_gather(rows, x_BD.detach().contiguous())
    rows[rank] = x_BD  # trap: all_gather returns constants, and without this line nothing would be learned
    return torch.cat(rows)


def sum_gradients(parameters):
    """Sum .grad over devices, in place: afterwards every device holds the gradient of the global batch."""
    if world()[1] == 1:
        return
    pending = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
    for work in pending:
        work.wait()


def sum_over_devices(x):
    """Return a tensor, summed over devices in place."""
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def chunk_seed(seed, i):
    """
    Return a 63-bit seed for chunk i of the step `seed` (a tuple): independent streams by numpy's
    SeedSequence.
    """
    state = np.random.SeedSequence([*seed, i]).generate_state(1, np.uint64)
    return int(state[0] >> 1)


# ---------------------------------------------------------------- between processes and threads
def gather_items(mine):
    """Gather {key: value}, made by each device for its own keys: all of them on every device."""
    devices = world()[1]
    if devices == 1:
        return mine
    everyones = [None] * devices
    dist.all_gather_object(everyones, mine)
    return {key: value for items in everyones for key, value in items.items()}


def any_device(flag, device):
    """
    Return True on all devices when `flag` is true on one: devices must leave a loop together, or the rest
    hang.
    """
    if world()[1] == 1:
        return bool(flag)
    flag = torch.tensor([float(bool(flag))], device=device)
    return bool(sum_over_devices(flag).item())


def prefetch(function, items):
    """Yield function(item) of each item in order; the next one is made in a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            ready, pending = pending, pool.submit(function, item)
            if ready:
                yield ready.result()
        if pending:
            yield pending.result()


def own_share(items):
    """Return this device's part of a list that all devices have; its length is a multiple of their number."""
    rank, devices = world()
    size = len(items) // devices
    return items[rank * size : (rank + 1) * size]


def cut(items, size):
    """Cut a list or a range into a list of pieces of `size`; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def share_out(groups, prepare, work, name):
    """
    Return {item: its result} on every device. groups: lists of items; each device takes every W-th list.

    work(prepare(group)) makes a result for each item of a group. The next group is prepared in a thread
    meanwhile. name: of the progress bar, which counts this device's groups.
    """
    rank, devices = world()
    mine = groups[rank::devices]
    bar = {"total": len(mine), "desc": name, "delay": 5, "leave": False, "disable": None}
    results = {}
    for group, ready in tqdm(zip(mine, prefetch(prepare, mine), strict=True), **bar):
        results |= zip(group, work(ready), strict=True)
    return gather_items(results)
