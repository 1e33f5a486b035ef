"""
A training run on disk: refuse or resume, logs, checkpoints, signals, best weights.

run_dir/  config.yaml (resolved, with command, commit, versions, devices)
          log.txt · metrics.jsonl (a row a step) · metrics.json (at the end)
          checkpoints/step_XXXXXXXX/ (the newest two and the best) · the best weights under their own names

A trainer's loop reads: for step, batch in run.steps(...): learn; run.log; run.dev; run.save.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

from utils.corpus import Corpus
from utils.distributed import any_device, prefetch
from utils.plumbing.checkpoint import load_moments, newest_checkpoint, publish, save_checkpoint
from utils.plumbing.config import ROOT, UserError, at_least, must_be_one_of, need_folder, need_model
from utils.plumbing.devices import peak_memory, rows_that_fit, start
from utils.plumbing.files import (
    atomic_file,
    folder_hash,
    lock,
    need_space,
    read_json,
    weights_hash,
    write_json,
)
from utils.plumbing.weights import width_of

# keys that a resume may change: files are compared by content, the others do not change what is learned
FREE = "config run_dir resume tracker log_every save_every corpus train dev init".split()
FREE += "train_run dev_run gold query_encoder doc_encoder embeddings reader".split()
NEW = {"keep": "best", "train_doc_encoder": True}  # what checkpoints of before December 2026 do not say
NO_DEV = [], "no dev set: the last checkpoint is the best"  # the dev questions, and what the log says of them
PUBLISHED = ("metrics.json", "query_encoder", "doc_encoder", "cross_encoder", "reader")


class Run:
    """
    What a trainer needs around its loop.

    files, weights: keys of cfg whose contents are part of the run's identity. UserError where run_dir holds a
    run and `resume` is "never", or where settings or files differ and `resume` is "exact".

    sizes: {key of cfg: (rows on a CPU, tokens of a row)}, how many rows go through a model together. A key of
    0 becomes the checkpoint's number, or what fits the device. The last of `weights` is this model.

    corpus: of cfg.corpus, or None. checkpoint: the folder to resume from, or None. state: stored in every
    checkpoint. notes: lines for the start of the log. first, last, total, warmup: steps, set by steps().
    """

    def __init__(self, cfg, files, weights, sizes):
        self.cfg, self.dir, self.sizes = cfg, Path(cfg.run_dir), sizes
        must_be_one_of(cfg, mixed_precision=("no", "fp16", "bf16"), tracker=("none", "wandb"))
        must_be_one_of(cfg, resume=("never", "exact", "changed"), keep=("best", "last"))
        at_least(cfg, 1, "batch_size", "epochs", "eval_batch_size", "save_every", "log_every")
        need_folder(cfg, "run_dir")
        if not (self.dir / "checkpoints").exists():  # a resume takes its weights from its checkpoint
            need_model(cfg, *weights)
        if cfg.tracker == "wandb" and not find_spec("wandb"):
            raise UserError("tracker wandb: `pip install wandb` first, or use --tracker none")

        if (self.dir / ".lock").exists() and os.environ.get("RANK", "0") == "0":
            lock(self.dir / ".lock")
        self.accelerator = start(cfg.mixed_precision)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        devices = self.accelerator.num_processes
        if cfg.batch_size % devices:
            raise UserError(f"batch_size {cfg.batch_size} is not shared by {devices} devices")
        with self.accelerator.main_process_first():  # the first to open a corpus writes its index
            self.corpus = Corpus(cfg.corpus, cfg.corpus_format) if cfg.corpus else None

        self.notes = []  # lines for the start of the log
        self.caught = []  # signals that have arrived
        self.wandb = None
        self.idle = False  # whether the last step had loss and gradient 0
        self.checkpoint = newest_checkpoint(self.dir, self.notes.append)
        stored = read_json(self.checkpoint / "state.json") if self.checkpoint else {"settings": {}}
        for key, (rows, length) in sizes.items():
            size = getattr(cfg, key) or stored["settings"].get(key)
            if not size:
                width = width_of(getattr(cfg, weights[-1])) if self.device.type == "cuda" else 0
                size = rows_that_fit(rows, length, width, self.device)
            setattr(cfg, key, size)

        # the identity of the run: its settings, the contents of its files, the number of devices
        settings = {key: value for key, value in vars(cfg).items() if key not in FREE}
        content = {key: folder_hash(getattr(cfg, key)) for key in files}
        content |= {key: weights_hash(getattr(cfg, key)) for key in weights}
        content["corpus"] = self.corpus.sha256 if self.corpus else ""
        if hasattr(cfg, "embeddings"):  # of EMDR2; its manifest holds the hash of every shard
            content["embeddings"] = folder_hash(Path(cfg.embeddings) / "manifest.json")
        settings |= {f"content of {key}": digest[:16] for key, digest in content.items()}
        settings["devices"] = devices
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

        self.state = {"step": 0, "best": None, "best_step": 0, "settings": settings, "minutes": 0.0}
        self.pair = ""  # of a passage encoder that stands still: all that is saved belongs to it
        if self.checkpoint:
            self._resume(settings, stored)
        for name in PUBLISHED if not self.checkpoint else ():
            if (self.dir / name).exists():  # it would be overwritten
                message = f"{self.dir} holds {name}, but no checkpoint to go on from"
                raise UserError(f"{message}: choose another --run_dir")

    def _resume(self, settings, stored):
        """Take over the checkpoint's state, if its settings are the same or may be changed."""
        if self.cfg.resume == "never":
            message = f"{self.dir} holds a run ({self.checkpoint.name})"
            raise UserError(f"{message}: add --resume exact, or another --run_dir")
        before = {key: value for key, value in NEW.items() if key in settings} | stored["settings"]
        changed = {}
        for key in sorted({*before, *settings}):
            if before.get(key) != settings.get(key):
                changed[key] = f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now"
        other_towers = "shared_encoder" in changed
        if changed and (self.cfg.resume == "exact" or other_towers):
            advice = "choose another --run_dir" if other_towers else "--resume changed goes on"
            raise UserError(f"{self.checkpoint} has other settings ({'; '.join(changed.values())}); {advice}")
        self.notes += [f"changed since the checkpoint: {change}" for change in changed.values()]
        self.state = stored | {"settings": settings}

    def source(self, name, start):
        """Return where the weights of `name` come from: the checkpoint of a resumed run, else `start`."""
        return self.checkpoint / name if self.checkpoint else start

    def optimizer(self, models, scales=None):
        """
        Return AdamW for the weights of {name: model}, with the checkpoint's moments in a resumed run.

        scales: {name: number by which a trainer multiplies its learning rate}, the "scale" of their groups.
        """
        # one model under two names (a shared encoder) counts once
        # trap: clipping sums in this order; the optimizer's own order changes the norm's last bit
        self.weights = list(torch.nn.ModuleDict(models).parameters())
        if scales:
            groups = []
            for name, model in models.items():
                groups += parameter_groups(model.parameters(), self.cfg, scale=scales[name])
        else:
            groups = parameter_groups(self.weights, self.cfg)
        # differs: torch's AdamW, whose epsilon is outside the bias correction; the originals' is inside
        optimizer = torch.optim.AdamW(groups, lr=self.cfg.learning_rate, eps=self.cfg.adam_epsilon)
        if self.checkpoint:
            load_moments(self.checkpoint, optimizer)
        # for fp16's loss scaler; the trainers sum gradients themselves
        return self.accelerator.prepare(optimizer)

    # ------------------------------------------------------------ the loop
    def steps(self, examples, batch_of, summary, unit="questions"):
        """
        Yield (step, batch) from where the run stands to where it ends.

        examples: how many there are; every epoch leaves over what does not fill a batch. batch_of(step): the
        next batch is made in a thread meanwhile. summary: what the log's first line says of this trainer.
        """
        self.unit = unit
        self._schedule(examples)
        size = sum(parameter.numel() for parameter in self.weights)
        if self.main:
            if not self.checkpoint:
                # 4 checkpoints (the newest two, the best, one being written) of 12 bytes a weight: itself and
                # AdamW's two moments; and the published copy of the best, 4 bytes a weight
                need_space(self.dir, (4 * 12 + 4) * size, "checkpoints")
            self.dir.mkdir(parents=True, exist_ok=True)
            lock(self.dir / ".lock")
            self._open_logs()
            self._write_config()
        for note in self.notes:
            self.say(note)
        together = ", ".join(f"{key} {getattr(self.cfg, key)}" for key in self.sizes)
        self.say(
            f"{size / 1e6:.1f} M parameters, {self.accelerator.num_processes} x {self.device.type}, "
            f"precision {self.accelerator.mixed_precision} | {together} | {summary} | "
            f"{self.per_epoch} steps an epoch, "
            f"{examples % self.cfg.batch_size} {unit} left over; {self.last} in all"
        )
        if self.accelerator.scaler and self.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(self.state["scaler"])

        if self.first < self.last:
            if self.main:  # a finished run that goes on is not finished; others look at this file
                (self.dir / "metrics.json").unlink(missing_ok=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._remember)
        self.began = time.time()
        steps = range(self.first, self.last)
        for step, batch in zip(steps, prefetch(batch_of, steps), strict=True):
            self.step_began = time.time()
            yield step, batch

        self._publish()
        if self.main:
            final = {key: self.state[key] for key in ("step", "minutes", "best", "best_step")}
            write_json(self.dir / "metrics.json", final)
            self.say(f"{self.dir}: finished: {json.dumps(final)}")
        self.accelerator.end_training()

    def _schedule(self, examples):
        """Set per_epoch, total (of the whole schedule), first, last (of this run) and warmup, in steps."""
        cfg = self.cfg
        self.per_epoch = examples // cfg.batch_size
        if not self.per_epoch:
            raise UserError(f"{cfg.train}: {examples} {self.unit} do not fill one batch of {cfg.batch_size}")
        self.total = self.per_epoch * cfg.epochs
        self.first = self.state["step"]
        self.last = min(self.total, cfg.stop_after or self.total)
        self.warmup = cfg.warmup if cfg.warmup >= 1 else cfg.warmup * self.total
        if self.warmup >= self.last:
            steps = f"{self.warmup:.0f} steps of warm-up in {self.last} steps"
            self.notes.append(f"warning: {steps}: the peak learning rate is never reached")

    def refuse_non_finite(self, loss, norm, lr):
        """Stop before the optimizer steps. A loss scaler (fp16) skips an infinite gradient by itself."""
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.accelerator.scaler):
            advice = "lower learning_rate, raise adam_epsilon, or leave fp16 for --mixed_precision bf16"
            if self.state["step"] == self.first and not self.weights_are_finite():
                advice = "the weights that the training starts from hold NaN or infinity: take others"
            raise UserError(
                f"step {self.state['step'] + 1}: loss {loss}, gradient norm {norm}, learning rate {lr:.2e}: "
                f"stopped before the weights changed, what {self.dir} holds is good; {advice}"
            )

    def weights_are_finite(self):
        return all(bool(torch.isfinite(weight).all()) for weight in self.weights)

    def log(self, shown, hidden):
        """
        Count a step, write its numbers, print `step 12/400 | loss 0.412 | lr 1.91e-05 | ... | eta 2h13m`.

        shown: name -> number, printed and written to metrics.jsonl; hidden: written only.
        """
        seconds = time.time() - self.step_began
        self.state["step"] += 1
        done = self.state["step"]
        idle = not (shown["loss"] or hidden["grad_norm"])
        if idle and not self.idle:
            self.say(f"warning: loss and gradient of step {done} are 0: from this batch nothing is learned")
        self.idle = idle
        self.record({"step": done, **shown, **hidden, "seconds": seconds})
        if done % self.cfg.log_every and done != self.last:
            return
        values = " | ".join(f"{k} {v:.2e}" if k == "lr" else f"{k} {v:.3f}" for k, v in shown.items())
        rate = f"{self.cfg.batch_size / seconds:.1f} {self.unit}/s"
        memory = f"{peak_memory(self.device) / 1e9:.1f} GB"
        left = (time.time() - self.began) / (done - self.first) * (self.last - done)
        eta = f"{left // 60:.0f}m{left % 60:02.0f}s"
        if left >= 3600:
            eta = f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m"
        self.say(f"step {done:>6}/{self.last} | {values} | {rate} | {memory} | eta {eta}")

    def time_to_evaluate(self):
        """Return whether the step just logged ends an epoch (or eval_every steps), or the run."""
        done = self.state["step"]
        return done % (self.cfg.eval_every or self.per_epoch) == 0 or done == self.last

    def dev(self, metrics, by, sign):
        """Log the dev metrics; `keep` best: of the largest sign * metrics[by] the weights are published."""
        best = self.state["best"]
        # why >=: of two that dev cannot tell apart, the one that has learned for longer
        better = self.cfg.keep == "last" or best is None or sign * metrics[by] >= sign * best
        if better:
            self.state |= {"best": metrics[by], "best_step": self.state["step"]}
        self.record({"step": self.state["step"], **metrics})
        values = " | ".join(f"{k} {v:.3f}" for k, v in metrics.items())
        note = " | best so far" if better and self.cfg.keep == "best" else ""
        self.say(f"dev after step {self.state['step']} | {values}{note}")

    def save(self, models, optimizer, evaluated):
        """
        Save {name: model} when due: after an evaluation, every save_every steps, at the end, on a signal.

        A signal then ends the process with 128 + its number and the command that goes on. Without a dev set
        the newest weights are the best.
        """
        done = self.state["step"]
        for model in models.values():
            # names the weights that belong together; check_pair (embeddings.py) compares what is before a +
            name = f"{self.fingerprint}-{done}"
            model.inputs["pair"] = f"{self.pair}+{name}" if self.pair else name
        stop = any_device(self.caught, self.device)
        if not (evaluated or stop or done == self.last or done % self.cfg.save_every == 0):
            return
        if not self.cfg.dev:
            self.state["best_step"] = done
        minutes = self.state["minutes"] + (time.time() - self.began) / 60
        # trap: an optimizer can make NaN of a finite gradient, for example with adam_epsilon 0
        if not self.weights_are_finite():
            kept = newest_checkpoint(self.dir, self.say) or "there is no checkpoint yet"
            fault = f"step {done}: a weight is NaN or infinite, nothing is saved (good: {kept})"
            raise UserError(f"{fault}; lower learning_rate, or raise adam_epsilon")
        if self.main:
            state = self.state | {"minutes": minutes}
            if self.accelerator.scaler:
                state["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(self.dir, done, models, optimizer, state, self.state["best_step"])
        if done == self.last:  # steps() publishes
            self.state["minutes"] = minutes
            return
        self._publish()
        if stop:
            self._stop(done)

    def _remember(self, number, _):
        self.caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C does not wait for the step

    def _stop(self, done):
        """Leave after a signal, with the command that goes on."""
        devices = self.accelerator.num_processes
        here = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
        nodes = "--standalone" if here == devices else f"--nnodes {devices // here} YOUR_RENDEZVOUS"
        launcher = f"torchrun {nodes} --nproc_per_node {here}" if devices > 1 else "python"
        command = f"{launcher} {shlex.join(sys.argv)} --resume exact"
        self.say(f"stopped by a signal after step {done}; go on with: {command}")
        sys.exit(128 + (self.caught or [signal.SIGTERM])[0])

    def _publish(self):
        """Copy the best weights to run_dir; all devices wait until they are there."""
        best = self.dir / "checkpoints" / f"step_{self.state['best_step']:08d}"
        if self.main and best.is_dir():
            publish(best, self.dir)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------ logs
    def _open_logs(self):
        """Open log.txt and metrics.jsonl, without the rows after the checkpoint: every step stands once."""
        path, kept = self.dir / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= self.first else []
            except ValueError:  # the half line of a killed run
                pass
        with atomic_file(path) as file:
            file.writelines(kept)
        self.jsonl = open(path, "a", encoding="utf-8")
        self.text = open(self.dir / "log.txt", "a", encoding="utf-8")
        if self.cfg.tracker == "wandb":
            import wandb

            # why offline without a key: training never stops at a login prompt; `wandb sync` uploads it later
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
            names = {"project": "dense-qa", "name": self.dir.name, "dir": self.dir}
            self.wandb = wandb.init(**names, config=vars(self.cfg), mode=mode)

    def _write_config(self):
        """Write config.yaml: the resolved settings, below the command, commit, versions and devices."""
        try:
            git = ["git", "describe", "--always", "--dirty"]
            commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except FileNotFoundError:  # no git on this machine
            commit = ""
        with atomic_file(self.dir / "config.yaml") as file:
            file.write(f"# command: {shlex.join(sys.argv)}\n# commit: {commit or 'unknown'}\n")
            file.write(f"# python {platform.python_version()}, torch {torch.__version__}\n")
            file.write(f"# devices: {self.accelerator.num_processes} x {self.device.type}\n")
            yaml.safe_dump({k: v for k, v in vars(self.cfg).items() if k != "config"}, file, sort_keys=False)

    def say(self, text):
        """Print a line for people, on the screen and into log.txt."""
        if self.main:
            print(text, flush=True)
            print(text, file=self.text, flush=True)

    def record(self, row):
        """Write a row of numbers for machines to metrics.jsonl, and to wandb when asked."""
        if self.main:
            row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
            print(json.dumps(row), file=self.jsonl, flush=True)
            if self.wandb:
                self.wandb.log(row, step=row["step"])


def parameter_groups(parameters, cfg, **more):
    """
    Return AdamW's two groups, each with the keys `more`. Biases and layer norms are not decayed (DPR
    dpr/models/hf_models.py:166, RocketQA model/src/optimization.py:102-131).
    """
    plain = []
    decayed = []
    for parameter in parameters:
        # why by shape, not by name as in DPR: biases and layer norms have one dimension in every model
        group = plain if parameter.ndim < 2 else decayed
        group.append(parameter)
    return [
        {"params": plain, "weight_decay": 0.0, **more},
        {"params": decayed, "weight_decay": cfg.weight_decay, **more},
    ]
