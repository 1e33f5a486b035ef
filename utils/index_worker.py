"""
EMDR2's asynchronous refresh: encode the passages anew beside a training run, on other devices.

In:   run_dir/refresh/step_XXXXXXXX/doc_encoder, which train_emdr2.py exports every refresh_every steps
Out:  run_dir/refresh/step_XXXXXXXX/embeddings, which train_emdr2.py takes over when it finds them
Run:  CUDA_VISIBLE_DEVICES=1 python -m utils.index_worker --run_dir runs/emdr2_nq --corpus data/nq/corpus.tsv
      The same command goes on after a crash. It ends with the training run, or at Ctrl-C.

The two processes share nothing but this folder, so either may be slow, die or start again without the other.
Whatever stands under its name is whole: it was written under a hidden name and renamed. Exports belong to
the trainer, embeddings and worker.json (the sign of life) to the worker.

Differs from EMDR2 (tasks/openqa/e2eqa/async_indexer.py): (1) Files where it has two broadcasts, so training
need not wait for a late index. (2) Always the newest export: older ones are skipped, and the encoder of step
0, whose vectors are there, is not encoded again. (3) A worker that died is noticed, and may be started again.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from utils.data import Corpus
from utils.plumbing.config import (
    ROOT,
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_value,
)
from utils.plumbing.files import read_json, sync_folder, write_json
from utils.plumbing.weights import save_encoder

KEEP = 2  # finished embeddings: the newest, and the one that the trainer may be reading meanwhile


# ---------------------------------------------------------------- the folder, for both sides
def folder_of(run_dir, step):
    """The folder of the export of `step`."""
    return Path(run_dir) / "refresh" / f"step_{step:08d}"


def vectors(run_dir, step):
    """The embeddings folder of the export of `step`; it exists only when it is complete."""
    return folder_of(run_dir, step) / "embeddings"


def steps_with(run_dir, name=""):
    """Ascending steps whose folder holds `name`; all for ""."""
    folders = (Path(run_dir) / "refresh").glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in folders if (path / name).is_dir())


def exported_step(run_dir):
    """Step of the newest complete export, 0 when there is none."""
    return max(steps_with(run_dir, "doc_encoder"), default=0)


def finished(run_dir):
    """The newest step whose embeddings are complete, 0 when there is none."""
    return max(steps_with(run_dir, "embeddings"), default=0)


def remove(folder):
    """Delete a folder that others look at: it vanishes at once, never half."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # the other side was faster
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


# ---------------------------------------------------------------- the trainer's side: one of its processes
def export(run_dir, step, encoder):
    """
    Hand the passage encoder of `step` over, atomically; a resumed run encodes its index from it, too. Exports
    of this step and newer ones are of a future that a resume has abandoned: they are deleted.
    """
    abandon(run_dir, step - 1)
    save_encoder(encoder, folder_of(run_dir, step) / "doc_encoder")


def abandon(run_dir, step):
    """Delete the exports newer than `step`, at which a run resumes, and their embeddings."""
    for other in steps_with(run_dir):
        if other > step:
            remove(folder_of(run_dir, other))


def clean(run_dir, keep):
    """
    Delete, but for the steps `keep` and those that a checkpoint resumes with, the exports older than the
    newest of these, and those that a newer export has overtaken before the worker came to them.
    """
    folder = Path(run_dir)
    states = [read_json(path) for path in folder.glob("checkpoints/step_*/state.json")]
    keep = {*keep, *(state.get("index_step", 0) for state in states)}
    life = folder / "refresh" / "worker.json"
    # trap: without it a worker slower than the exports would lose each one before it is done
    at_work = read_json(life)["step"] if life.is_file() else 0
    for other in steps_with(run_dir):
        overtaken = other < exported_step(run_dir) and not vectors(run_dir, other).is_dir()
        if other not in keep and (other < max(keep, default=0) or (overtaken and other != at_work)):
            remove(folder_of(run_dir, other))
    for leftover in (Path(run_dir) / "refresh").glob(".step_*.old"):  # of a killed call
        shutil.rmtree(leftover, ignore_errors=True)


def worker_state(run_dir, patience_s=60):
    """
    "" while a worker is at work, else one line that says what is wrong: none was ever seen, its process is
    gone (as far as this machine can tell), or it gave no sign of life for more than `patience_s` seconds.
    """
    path = Path(run_dir) / "refresh" / "worker.json"
    if not path.is_file():
        return f"no index worker has been seen; start one: python -m utils.index_worker --run_dir {run_dir}"
    life = read_json(path)
    who, age = f"index worker {life['pid']} on {life['host']}", time.time() - life["time"]
    if life["host"] == socket.gethostname():
        try:
            os.kill(life["pid"], 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            return f"{who}: its process is gone, last sign of life {age:.0f} s ago; start it again"
        except PermissionError:  # there, and somebody else's
            pass
    return f"{who}: last sign of life {age:.0f} s ago" if age > patience_s else ""


# ---------------------------------------------------------------- the worker's side
def show_life(run_dir, step):
    """A sign of life; step: the export being encoded, 0 for none."""
    life = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), "step": step}
    write_json(Path(run_dir) / "refresh" / "worker.json", life)


def take_place(cfg):
    """
    The open lock file of run_dir, locked. UserError when another worker is at work. The encoding process
    inherits the lock: after a killed worker, its orphan is waited for instead of joined in one folder.
    """
    folder, said = Path(cfg.run_dir) / "refresh", False
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "worker.lock", "a")
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if not worker_state(cfg.run_dir):
                life = read_json(folder / "worker.json")
                raise UserError(
                    f"{cfg.run_dir} has a worker: process {life['pid']} on {life['host']}; one is enough"
                ) from None
        if not said:
            print(f"{folder}: waiting for the encoding that a killed worker left behind", flush=True)
        said = True
        time.sleep(cfg.poll_seconds)


def search_path():
    """PATH with the environment that runs this first: its `python`, `accelerate` and `torchrun`."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def identity(folder):
    """What tells a folder from another that takes its place; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        stat = folder.stat()
        return stat.st_ino, stat.st_mtime_ns
    return None


def encode(cfg, step, lock):
    """
    Make the embeddings of the export of `step`. Nothing is made when training ends or withdraws the export
    meanwhile; UserError when doc2embedding.py fails. lock: the file of take_place.
    """
    folder = folder_of(cfg.run_dir, step)
    source, building = folder / "doc_encoder", folder / ".embeddings.tmp"
    keys = {"doc_encoder": source, "out": building}
    keys |= {key: getattr(cfg, key) for key in ("corpus", "corpus_format", "batch_size", "mixed_precision")}
    argv = [*shlex.split(cfg.launch), str(ROOT / "doc2embedding.py")]
    argv += [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    show_life(cfg.run_dir, step)  # from here on the trainer leaves this export alone
    began, encoder = time.time(), identity(source)
    if not encoder:
        return
    # why a session of its own: the signals below reach the whole family, Ctrl-C reaches only us
    child = subprocess.Popen(
        argv, env=os.environ | {"PATH": search_path()}, start_new_session=True, pass_fds=[lock.fileno()]
    )
    try:
        while child.poll() is None:
            show_life(cfg.run_dir, step)
            if training_ended(cfg):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(cfg.poll_seconds)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
    if identity(source) == encoder:
        if child.returncode or not (building / "manifest.json").is_file():
            raise UserError(
                f"doc2embedding.py failed on {source} (exit code {child.returncode}, its message is above); "
                "start the worker again when that is settled, it goes on from there"
            )
        with contextlib.suppress(FileNotFoundError):  # withdrawn in this very moment
            os.replace(building, vectors(cfg.run_dir, step))
            sync_folder(folder)
            minutes = (time.time() - began) / 60
            print(f"step {step}: embeddings complete in {minutes:.1f} minutes", flush=True)
            return
    # a run that was killed and resumed has exported this step anew, or will
    print(f"step {step}: withdrawn by the training run, its vectors are dropped", flush=True)
    remove(building if source.is_dir() else folder)


def forget_old(run_dir):
    """Delete all embeddings but the newest KEEP, and what was begun for exports that are older than these."""
    done = steps_with(run_dir, "embeddings")
    for step in done[:-KEEP]:
        remove(vectors(run_dir, step))
    for step in steps_with(run_dir, ".embeddings.tmp"):
        if step < max(done, default=0):
            shutil.rmtree(folder_of(run_dir, step) / ".embeddings.tmp", ignore_errors=True)


def check_corpus(run_dir, corpus):
    """UserError where the run's checkpoints say that it reads another corpus; without one, nobody knows."""
    states = sorted(Path(run_dir).glob("checkpoints/step_*/state.json"))
    known = read_json(states[-1])["settings"].get("content of corpus") if states else None
    if known and not corpus.sha256.startswith(known):  # the run would stop at these vectors
        raise UserError(f"{run_dir} is trained on another corpus than {corpus.path}: give its own --corpus")


def training_ended(cfg):
    """Whether the training run has written its last file."""
    return (Path(cfg.run_dir) / "metrics.json").is_file()


def main():
    cfg = load_config(__doc__, "config/index_worker.yaml")
    must_be_one_of(cfg, mixed_precision=("no", "fp16", "bf16"))
    at_least(cfg, 1, "batch_size")
    at_least(cfg, 0.1, "poll_seconds")
    need_value(cfg, "run_dir", "launch")
    need_file(cfg, "corpus")
    program = shlex.split(cfg.launch)[0]
    if not shutil.which(program, path=search_path()):
        raise UserError(
            f"launch: {program!r}: no such program; write python, or a launcher that is installed"
        )
    corpus = Corpus(cfg.corpus, cfg.corpus_format)  # a broken one is found before anything waits for it
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    lock = take_place(cfg)
    print(f"{cfg.run_dir}: waiting for exports; {len(corpus):,} passages each", flush=True)
    while not training_ended(cfg):
        show_life(cfg.run_dir, 0)
        newest = exported_step(cfg.run_dir)
        if newest > finished(cfg.run_dir):
            check_corpus(cfg.run_dir, corpus)
            encode(cfg, newest, lock)
            forget_old(cfg.run_dir)
        else:
            time.sleep(cfg.poll_seconds)
    print(f"{cfg.run_dir}: training has finished, so has its worker", flush=True)


if __name__ == "__main__":
    with friendly_errors():
        main()
