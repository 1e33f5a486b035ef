"""
Devices: what runs where, and what has a gradient. `accelerate launch` starts one process a device.

The rule for gradients across devices, used by every trainer here: each device computes the loss of the
*global* batch, its own rows live and all other rows constants; then gradients are *summed* over devices. That
is exactly the gradient of the full batch on one device. trap: DistributedDataParallel takes the mean instead,
which makes it 1/W of the true one: DPR and nanoDPR train with that factor, GC-DPR always with 1/8 (see
`gradient_scale` in config/train_dpr_nq.yaml).
"""

import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from utils.plumbing.config import UserError


def start(mixed_precision="no"):
    """The Accelerator of this process. Asserts that as many processes run as the launcher was asked for."""
    # why: cores / processes threads each; two processes with all cores each are slower than one (measured:
    # 1.17x of one thread against 1.87x). More than one in OMP_NUM_THREADS is the user's choice and kept.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun itself sets 1
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # why cpu=: without a GPU accelerate would start torchrun's second process as a lonely first one
    lonely = asked > 1 and not torch.cuda.is_available()
    # why: while one device hashes tens of GB the others wait, and NCCL ends them after ten minutes
    # from: EMDR2 megatron/mpu/initialize.py:255-264
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=4))
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=lonely, kwargs_handlers=[patience])
    # trap: `accelerate launch --cpu --num_processes 2` has been seen to start a single process without a word
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} run; use torchrun instead"
        )
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError('mixed_precision fp16 needs a GPU; a CPU takes "no" (fastest there) or bf16')
    return accelerator


def world():
    """(rank, number of devices); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_rows(x_BD):
    """
    [B, D] on each of W devices -> [W*B, D] on each, in device order; only this device's own rows have a
    gradient.
    """
    rank, devices = world()
    if devices == 1:
        return x_BD
    parts = [torch.empty_like(x_BD, requires_grad=False) for _ in range(devices)]
    dist.all_gather(parts, x_BD.detach().contiguous())
    parts[rank] = x_BD  # trap: all_gather returns constants, and without this line nothing would be learned
    return torch.cat(parts)


def sum_gradients(parameters):
    """Sum .grad over devices, in place: afterwards every device holds the gradient of the global batch."""
    if world()[1] > 1:
        pending = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
        for work in pending:
            work.wait()


def gather_items(mine):
    """{key: value} that each device has made for its own keys -> all of them on every device."""
    devices = world()[1]
    if devices == 1:
        return mine
    everyones = [None] * devices
    dist.all_gather_object(everyones, mine)
    return {key: value for one in everyones for key, value in one.items()}


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


def any_device(flag, device):
    """
    True on all devices as soon as `flag` is true on one: devices must leave a loop together, or the rest
    hang.
    """
    if world()[1] == 1:
        return bool(flag)
    flag = torch.tensor([float(bool(flag))], device=device)
    dist.all_reduce(flag)
    return bool(flag.item())


def peak_memory(device):
    """Peak bytes so far: allocated on `device` where that is a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
