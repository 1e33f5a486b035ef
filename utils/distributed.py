"""
Devices: what runs where, what has a gradient, and the one log line. `accelerate launch` starts one process a
device.

The rule for gradients across devices, used by every trainer here: each device computes the loss of the
*global* batch, its own rows live and all other rows constants; then gradients are *summed* over devices. That
is exactly the gradient of the full batch on one device. trap: DistributedDataParallel takes the mean instead,
which makes it 1/W of the true one (DPR, GC-DPR and nanoDPR all train with that factor; see `gradient_scale`
in config/train_dpr_nq.yaml).
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from utils.config import UserError


def start(mixed_precision="no"):
    """The Accelerator of this process. Asserts that as many processes run as the launcher was asked for."""
    # why: cores / processes threads each; two processes with all cores each are slower than one (measured:
    # 1.17x of one thread against 1.87x). A number the user has set is kept.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local > 1 and "DENSEQA_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    accelerator = Accelerator(mixed_precision=mixed_precision)
    asked = int(os.environ.get("WORLD_SIZE", 1))
    # trap: `accelerate launch --cpu --num_processes 2` has been seen to start a single process without a word
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} run; use torchrun instead"
        )
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


def any_device(flag, device):
    """
    True on all devices as soon as `flag` is true on one: devices must leave a loop together, or the rest
    hang.
    """
    if world()[1] == 1:
        return bool(flag)
    flag = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flag)
    return bool(flag.item())


def peak_memory():
    """Peak bytes so far: of this process's GPU where it has one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Log:
    """
    One line a step on the screen, in run_dir/log.txt and, as numbers, in run_dir/metrics.jsonl; wandb when
    asked. Only the first process writes. `step` is the step from which a resumed run goes on: later lines of
    a killed run are dropped, so that every step stands once in metrics.jsonl.
    """

    def __init__(self, run_dir, cfg, total, tracker="none", step=0):
        self.total, self.first, self.started, self.wandb = total, step, time.time(), None
        self.main = world()[0] == 0
        if not self.main:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:  # the half line of a killed run
                    pass
        path.write_text("".join(kept))
        self.jsonl, self.text = open(path, "a"), open(run_dir / "log.txt", "a")
        if tracker == "wandb":
            try:
                import wandb
            except ImportError:
                raise UserError("tracker wandb: `pip install wandb` first, or use --tracker none") from None
            # why offline without a key: training must never stop at a login prompt; `wandb sync` uploads it
            # later
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
            self.wandb = wandb.init(
                project="dense-qa", name=run_dir.name, dir=run_dir, config=vars(cfg), mode=mode
            )

    def say(self, text):
        """A line for people: screen and log.txt."""
        if self.main:
            print(text, flush=True)
            self.text.write(text + "\n")
            self.text.flush()

    def step(self, step, rate, shown, hidden=None, show=True):
        """
        The house line `step 12/400 | loss 0.412 | ... | 512 q/s | 11.2 GB | eta 2h13m` and its row in
        metrics.jsonl.
        rate: (number, unit), such as (512.0, "q/s"). shown: name -> number, in order; hidden: written, not
        printed.
        """
        if not self.main:
            return
        left = (time.time() - self.started) / max(1, step - self.first) * (self.total - step)
        eta = (
            f"{left / 3600:.0f}h{left % 3600 / 60:02.0f}m"
            if left >= 3600
            else f"{left // 60:.0f}m{left % 60:02.0f}s"
        )
        row = {"step": step, **shown, **(hidden or {})}
        self.jsonl.write(json.dumps(row) + "\n")
        self.jsonl.flush()
        if self.wandb:
            self.wandb.log(row, step=step)
        if show:
            values = " | ".join(f"{k} {v:.2e}" if k == "lr" else f"{k} {v:.3f}" for k, v in shown.items())
            memory = f"{peak_memory() / 1e9:.1f} GB"
            self.say(
                f"step {step:>6}/{self.total} | {values} | {rate[0]:.1f} {rate[1]} | {memory} | eta {eta}"
            )
