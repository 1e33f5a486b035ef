"""Two nodes: two launchers of one process each give what one launcher of two processes gives."""

import pytest

from tests import processes, test_train_dpr
from tests.processes import rows, run
from utils.plumbing.files import sha256

torchruns = processes.torchruns


def nodes(processes):
    """What `torchrun --nnodes W --nproc_per_node 1` tells the process of each node: it is the first there."""
    own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    places = torchruns(processes)
    return [place | own | {"GROUP_RANK": str(rank)} for rank, place in enumerate(places)]


@pytest.fixture
def both(monkeypatch):
    """both(script, keys): run it on two processes of one node, then on two nodes; what the latter print."""

    def call(script, keys, name):
        for kind, places in (("node", torchruns), ("nodes", nodes)):
            monkeypatch.setattr(processes, "torchruns", places)
            done = run(script, keys | {name: keys[name] / kind}, processes=2)
            assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return call


def test_two_nodes_train_to_the_same_loss(world, tmp_path, both):
    """Every number of every step has the bits of one node's; so have the weights."""
    keys = test_train_dpr.keys(world, tmp_path, dropout=0.0, grad_cache=True, stop_after=5)
    assert "2 x cpu" in both("train_dpr.py", keys, "run_dir")
    node, two = (rows(tmp_path / name) for name in ("node", "nodes"))
    assert len(two) > 5 and two == node
    for name in ("query_encoder", "doc_encoder"):
        file = f"{name}/model.safetensors"
        assert sha256(tmp_path / "node" / file) == sha256(tmp_path / "nodes" / file)


def test_two_nodes_encode_the_same_shards(world, tmp_path, both):
    """Node i writes every second shard; the folder is that of one node, byte for byte."""
    keys = {"doc_encoder": world / "doc_encoder", "corpus": world / "corpus.tsv", "out": tmp_path}
    both("doc2embedding.py", keys | {"shard_size": 16, "batch_size": 4}, "out")
    files = sorted(file.name for file in (tmp_path / "node").iterdir())
    assert "00003.npy" in files and "ids.txt" in files
    assert files == sorted(file.name for file in (tmp_path / "nodes").iterdir())
    for name in files:
        assert sha256(tmp_path / "nodes" / name) == sha256(tmp_path / "node" / name), name
