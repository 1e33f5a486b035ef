"""
A training run on disk, the same for every trainer: refuse or resume, the log line, checkpoints, signals.

run_dir/  config.yaml (resolved, with command, commit, versions, devices)
          log.txt · metrics.jsonl (a row a step) · metrics.json (at the end)
          checkpoints/step_XXXXXXXX/ (the newest two and the best) · the best weights under their own names
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

from utils.distributed import any_device, peak_memory
from utils.plumbing.checkpoint import newest_checkpoint, publish, save_checkpoint
from utils.plumbing.config import ROOT, UserError, need_folder, need_model
from utils.plumbing.files import atomic_file, need_space, read_json, write_json

# Keys that may change between a run and its resume: files are compared by content, the others teach nothing.
FREE = "config run_dir resume tracker dry_run log_every save_every corpus train dev init".split()
FREE += "train_run dev_run gold test test_run out workers query_encoder doc_encoder embeddings reader".split()


def plan(examples, cfg, what="questions"):
    """
    (steps of an epoch, of the whole schedule, until the run ends, of warm-up, [a warning] or []) for so many
    examples. UserError where they do not fill one batch.
    """
    per_epoch = examples // cfg.batch_size
    if not per_epoch:
        raise UserError(f"{cfg.train}: {examples} {what} do not fill one batch of {cfg.batch_size}")
    total = per_epoch * cfg.epochs
    last = min(total, cfg.stop_after or total)
    warmup = cfg.warmup if cfg.warmup >= 1 else cfg.warmup * total
    late = f"warning: {warmup:.0f} steps of warm-up in {last} steps: the peak learning rate is never reached"
    return per_epoch, total, last, warmup, [late] * (warmup >= last)


def need_start(cfg, *keys):
    """
    UserError, before any work, where run_dir cannot be written, or a key names no model to start from; a
    resume takes its weights from its checkpoint.
    """
    need_folder(cfg, "run_dir")
    if not Path(cfg.run_dir, "checkpoints").exists():
        need_model(cfg, *keys)


class Run:
    """
    cfg: needs run_dir, resume (never | exact | changed), tracker, save_every, log_every, dry_run. content:
    name -> hash of every file that the run depends on. state: {"step", "best", "best_step", "settings",
    "minutes"}, stored in every checkpoint; `checkpoint`: the folder to resume from, or None. UserError where
    run_dir holds a run and resume is "never", or where settings or files differ and resume is "exact".
    """

    def __init__(self, cfg, accelerator, content):
        self.cfg, self.accelerator, self.dir = cfg, accelerator, Path(cfg.run_dir)
        settings = {key: value for key, value in vars(cfg).items() if key not in FREE}
        settings |= {f"content of {key}": digest[:16] for key, digest in content.items()}
        settings |= {"devices": accelerator.num_processes}
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.state = {"step": 0, "best": None, "best_step": 0, "settings": settings, "minutes": 0.0}
        self.notes, self.evaluated, self.wandb, self.caught = [], False, None, []
        if cfg.tracker == "wandb" and not find_spec("wandb"):
            raise UserError("tracker wandb: `pip install wandb` first, or use --tracker none")
        self.checkpoint = newest_checkpoint(self.dir, self.notes.append)
        if cfg.dry_run:
            return
        if not self.checkpoint:
            for name in ("metrics.json", "query_encoder", "doc_encoder", "cross_encoder", "reader"):
                if (self.dir / name).exists():  # it would be overwritten
                    raise UserError(
                        f"{self.dir} holds {name}, but no checkpoint to go on from: choose another --run_dir"
                    )
            return
        if cfg.resume == "never":
            raise UserError(
                f"{self.dir} holds a run ({self.checkpoint.name}): add --resume exact, or another --run_dir"
            )
        stored = read_json(self.checkpoint / "state.json")
        before = stored["settings"]
        changed = {
            key: f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now"
            for key in sorted({*before, *settings})
            if before.get(key) != settings.get(key)
        }
        if changed and (cfg.resume == "exact" or "shared_encoder" in changed):
            advice = "choose another --run_dir" if "shared_encoder" in changed else "--resume changed goes on"
            raise UserError(f"{self.checkpoint} has other settings ({'; '.join(changed.values())}); {advice}")
        self.notes += [f"changed since the checkpoint: {change}" for change in changed.values()]
        self.state = stored | {"settings": settings}

    def start(self, last, parameters, notes):
        """
        Open the logs, say `notes` and catch SIGTERM and Ctrl-C. last: the step at which the run ends.
        parameters: number of weights, for the disk check. False when the run is already finished.
        """
        self.last, self.first, self.began = last, self.state["step"], time.time()
        self.main = self.accelerator.is_main_process
        if self.main:
            if not self.checkpoint:  # two, the best, one being written (weights, two moments); the best again
                need_space(self.dir, (4 * 12 + 4) * parameters, "checkpoints")
            self.dir.mkdir(parents=True, exist_ok=True)
            self._open_logs()
            self._write_config()
        for note in self.notes + notes:
            self.say(note)
        if self.accelerator.scaler and self.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(self.state["scaler"])
        if self.first >= last:
            self._publish()
            self._finish(self.state)
            return False
        if self.main:  # a finished run that goes on is not finished; others look at this file
            (self.dir / "metrics.json").unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)
        return True

    def _remember(self, number, _):
        self.caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C does not wait for the step

    def _open_logs(self):
        # Later lines of a killed run are dropped, so that every step stands once in metrics.jsonl.
        path, kept = self.dir / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= self.first else []
            except ValueError:  # the half line of a killed run
                pass
        with atomic_file(path) as file:
            file.writelines(kept)
        self.jsonl, self.text = open(path, "a"), open(self.dir / "log.txt", "a")
        if self.cfg.tracker == "wandb":
            import wandb

            # why offline without a key: training never stops at a login prompt; `wandb sync` uploads it later
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
            self.wandb = wandb.init(
                project="dense-qa", name=self.dir.name, dir=self.dir, config=vars(self.cfg), mode=mode
            )

    def _write_config(self):
        try:
            git = ["git", "describe", "--always", "--dirty"]
            commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except FileNotFoundError:  # no git on this machine
            commit = ""
        with atomic_file(self.dir / "config.yaml") as file:
            file.write(f"# command: {shlex.join(sys.argv)}\n# commit: {commit or 'unknown'}\n")
            file.write(f"# python {platform.python_version()}, torch {torch.__version__}\n")
            file.write(f"# devices: {self.accelerator.num_processes} x {self.accelerator.device.type}\n")
            yaml.safe_dump({k: v for k, v in vars(self.cfg).items() if k != "config"}, file, sort_keys=False)

    def say(self, text):
        """A line for people: screen and log.txt."""
        if self.main:
            print(text, flush=True)
            self.text.write(text + "\n")
            self.text.flush()

    def record(self, row):
        """A row of numbers for machines: metrics.jsonl, and wandb when asked."""
        if self.main:
            row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
            self.jsonl.write(json.dumps(row) + "\n")
            self.jsonl.flush()
            if self.wandb:
                self.wandb.log(row, step=row["step"])

    def refuse_non_finite(self, loss, norm, lr):
        """Stop before the optimizer steps. A loss scaler (fp16) skips an infinite gradient by itself."""
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.accelerator.scaler):
            raise UserError(
                f"step {self.state['step'] + 1}: loss {loss}, gradient norm {norm}, learning rate {lr:.2e}: "
                f"stopped before the weights changed, what {self.dir} holds is good; lower learning_rate"
            )

    def step(self, rate, shown, hidden):
        """
        One step is done: the house line `step 12/400 | loss 0.412 | ... | 512 q/s | 11.2 GB | eta 2h13m`.
        rate: such as "512.0 q/s". shown: name -> number, in order; hidden: written to metrics.jsonl, not
        printed.
        """
        self.evaluated = False
        self.state["step"] = done = self.state["step"] + 1
        self.record({"step": done, **shown, **hidden})
        if done % self.cfg.log_every == 0 or done == self.last:
            left = (time.time() - self.began) / (done - self.first) * (self.last - done)
            eta = (
                f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m"
                if left >= 3600
                else f"{left // 60:.0f}m{left % 60:02.0f}s"
            )
            values = " | ".join(f"{k} {v:.2e}" if k == "lr" else f"{k} {v:.3f}" for k, v in shown.items())
            memory = f"{peak_memory(self.accelerator.device) / 1e9:.1f} GB"
            self.say(f"step {done:>6}/{self.last} | {values} | {rate} | {memory} | eta {eta}")

    def dev(self, metrics, by, sign):
        """
        Metrics of the dev set; the checkpoint of this step is the best when sign * metrics[by] is the largest
        yet.
        """
        self.evaluated = True
        better = self.state["best"] is None or sign * metrics[by] > sign * self.state["best"]
        if better:
            self.state |= {"best": metrics[by], "best_step": self.state["step"]}
        self.record({"step": self.state["step"], **metrics})
        values = " | ".join(f"{k} {v:.3f}" for k, v in metrics.items())
        self.say(f"dev after step {self.state['step']} | {values}{' | best so far' if better else ''}")

    def save(self, models, optimizer, evaluates):
        """
        Save a checkpoint when one is due: after an evaluation, every save_every steps, at the end, and on a
        signal, which then ends the process with 128 + its number and the command that goes on. models: name
        -> encoder.
        evaluates: False where there is no dev set, so that the newest weights are the best.
        """
        done = self.state["step"]
        stop = any_device(self.caught, self.accelerator.device)
        if not (self.evaluated or stop or done == self.last or done % self.cfg.save_every == 0):
            return
        if not evaluates:
            self.state["best_step"] = done
        now = self.state | {"minutes": self.state["minutes"] + (time.time() - self.began) / 60}
        if self.main:
            if self.accelerator.scaler:
                now["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(self.dir, done, models, optimizer, now, protect=self.state["best_step"])
        self._publish()
        if done == self.last:
            self._finish(now)
        elif stop:
            devices = self.accelerator.num_processes
            launcher = f"torchrun --standalone --nproc_per_node {devices}" if devices > 1 else "python"
            again = f"{launcher} {shlex.join(sys.argv)} --resume exact"
            self.say(f"stopped by a signal after step {done}; go on with: {again}")
            sys.exit(128 + (self.caught or [signal.SIGTERM])[0])

    def _publish(self):
        best = self.dir / "checkpoints" / f"step_{self.state['best_step']:08d}"
        if self.main and best.is_dir():
            publish(best, self.dir)
        self.accelerator.wait_for_everyone()

    def _finish(self, state):
        if self.main:
            final = {key: state[key] for key in ("step", "minutes", "best", "best_step")}
            write_json(self.dir / "metrics.json", final)
            self.say(f"{self.dir}: finished: {json.dumps(final)}")
        self.accelerator.end_training()
