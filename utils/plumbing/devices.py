"""
The start of a script: which devices run, what the environment may say, how much goes through a model at once.

What happens between the devices afterwards is in utils/distributed.py.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import InitProcessGroupKwargs

from utils.distributed import gather_items, world
from utils.plumbing.config import UserError

# accelerate obeys these variables. {name: its harmless value}; another fails, or changes what is learned
PLAIN = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DYNAMO_BACKEND": "no"}
PLAIN |= {f"ACCELERATE_USE_{name}": "false" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "SAGEMAKER")}
PLAIN |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "false"}
LAUNCHED = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"}  # numbers that torchrun tells each process

# Tokens of one forward pass on a GPU. why so many: a GPU waits for the program that launches its work. With
# an H200 one pass of BERT-base took 20 ms, however small it was; training made 290 questions/s in chunks of
# 64 passages, and 670 in chunks of 256, which are 64k tokens. More was not measured
# (results/bench/gpu_h200.txt).
TOKENS_A_PASS = 2**16
# Bytes that are kept until the backward pass, for each token, layer and hidden number. An H200 had 66 for
# BERT-base in float32, 47 under bf16's autocast (docs/log.md, "Sizes fit the device").
BYTES_A_NUMBER = 70


def check_environment(mixed_precision):
    """UserError for what the environment must not say; a warning for what it says and is not used."""
    env = os.environ
    for name, plain in PLAIN.items():
        if env.get(name, "").lower() not in ("", "0", plain):
            fault = f"{name}={env[name]} in the environment would change what this script does"
            raise UserError(f"{fault}; unset it, or run `accelerate config` again and choose {plain}")

    # the variables of a launcher: all of them, or none
    numbers = {name for name in LAUNCHED if env.get(name, "").isdigit()}
    launched = "LOCAL_RANK" in env or env.get("WORLD_SIZE", "1") != "1"
    if launched and (numbers != LAUNCHED or not env.get("MASTER_ADDR")):
        fault = (
            f"the environment has {', '.join(sorted(env.keys() & LAUNCHED))}, but no launcher set them all"
        )
        raise UserError(f"{fault}; start with torchrun, or: unset {' '.join(sorted(LAUNCHED))} MASTER_ADDR")

    # what accelerate was told, and is not used
    warnings = []
    precision = env.get("ACCELERATE_MIXED_PRECISION", mixed_precision)
    if precision not in ("no", mixed_precision):
        warnings.append(
            f"accelerate's mixed_precision {precision} is not used, the key says {mixed_precision}"
        )
    if Path(default_config_file).is_file() and not launched and "ACCELERATE_MIXED_PRECISION" not in env:
        warnings.append(f"{default_config_file} is not used: only `accelerate launch` reads it")
    # trap: asked for several processes without a GPU, it starts one and only sets MASTER_ADDR
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and not launched:
        warnings.append("accelerate launch started one process; for several: torchrun --nproc_per_node N")
    if launched and "TORCHELASTIC_RUN_ID" not in env:
        warnings.append(
            f"waits for {env['WORLD_SIZE']} processes, as WORLD_SIZE says; no torchrun is at work"
        )
    for warning in warnings if env.get("RANK", "0") == "0" else ():
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def start(mixed_precision="no"):
    """
    Return the Accelerator of this process. UserError unless as many processes run as the launcher was asked
    for.
    """
    check_environment(mixed_precision)
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
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=lonely, kwargs_handlers=[patience])
    except (ValueError, RuntimeError) as error:  # of a variable, a port that is taken, a GPU that is busy
        raise UserError(f"accelerate cannot start with this environment: {error}") from None

    # trap: `accelerate launch --cpu --num_processes 2` has been seen to start a single process without a word
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} run; use torchrun instead"
        )
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError('mixed_precision fp16 needs a GPU; a CPU takes "no" (fastest there) or bf16')
    return accelerator


def rows_that_fit(rows, length, width, device):
    """
    Return how many rows of `length` tokens go through a model together: on a CPU `rows`, on a GPU as many as
    make TOKENS_A_PASS, or fewer where its free memory is too small for them. The same on all devices, at
    least 1.

    width: how many hidden numbers the model keeps of a token: its hidden size; for a backward pass times its
    layers.
    """
    if device.type != "cuda":
        return rows
    # why half: weights, AdamW's moments and the scores need room too
    free, _ = torch.cuda.mem_get_info(device)
    tokens = min(TOKENS_A_PASS, free // 2 // (BYTES_A_NUMBER * width))
    fits = gather_items({world()[0]: max(1, tokens // length)})
    return min(fits.values())


def peak_memory(device):
    """
    Return the peak bytes so far: allocated on `device` where that is a GPU, else resident memory of the
    process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # no `resource` there; the memory of now
        return psutil.Process().memory_info().rss
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
