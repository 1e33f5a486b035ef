"""Mistakes in a config end in one line that names the key, the file and the nearest right name."""

import pytest
import yaml

from utils.config import ROOT, UserError, load_config
from utils.files import folder_hash, weights_hash

SCHEMA = "config/train_dpr_nq.yaml"


def test_the_schema_is_the_default_and_overrides_win():
    """--key value and --key=value override the yaml; a bare flag of a boolean key means true."""
    cfg = load_config(
        "doc", SCHEMA, ["--batch_size", "64", "--learning_rate=1e-4", "--grad_cache", "--dev", ""]
    )
    assert (cfg.batch_size, cfg.learning_rate, cfg.grad_cache, cfg.dev) == (64, 1e-4, True, "")


def test_scientific_notation_in_yaml_is_a_number(tmp_path):
    """PyYAML reads 2e-5 as a string; we do not."""
    text = (ROOT / SCHEMA).read_text().replace("learning_rate: 2.0e-5", "learning_rate: 2e-5")
    (tmp_path / "x.yaml").write_text(text)
    assert load_config("doc", SCHEMA, ["--config", str(tmp_path / "x.yaml")]).learning_rate == 2e-5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "8"], ["--batchsize", "batch_size"]),
        (["--batch_size", "many"], ["batch_size", "int", "'many'"]),
        (["--batch_size", "1.5"], ["batch_size", "int"]),
        (["--grad_cache", "maybe"], ["grad_cache", "bool"]),
        (["--learning_rate", "fast"], ["learning_rate", "float"]),
        (["--seed"], ["--seed", "value"]),
        (["batch_size", "8"], ["'batch_size'", "--key value"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    """The message holds what is wrong and what would be right."""
    with pytest.raises(UserError) as error:
        load_config("doc", SCHEMA, argv)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mistakes_in_a_yaml(tmp_path):
    """An unknown key names the nearest; a missing one and broken yaml name the file."""
    values = yaml.safe_load((ROOT / SCHEMA).read_text())
    path = tmp_path / "x.yaml"
    for change, word in (({"epoch": 3}, "epochs"), ({"seed": "one"}, "seed")):
        path.write_text(yaml.safe_dump(values | change))
        with pytest.raises(UserError, match=word):
            load_config("doc", SCHEMA, ["--config", str(path)])
    del values["seed"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="seed.*missing"):
        load_config("doc", SCHEMA, ["--config", str(path)])
    path.write_text("a: [1")
    with pytest.raises(UserError, match="x.yaml"):
        load_config("doc", SCHEMA, ["--config", str(path)])


def test_help_lists_every_key(capsys):
    """--help prints the docstring and the schema with its comments, and leaves."""
    with pytest.raises(SystemExit) as leave:
        load_config("What it does.", SCHEMA, ["--help"])
    shown = capsys.readouterr().out
    assert leave.value.code == 0 and "What it does." in shown
    assert all(f"{key}:" in shown for key in yaml.safe_load((ROOT / SCHEMA).read_text()))


def test_all_configs_of_a_script_have_its_keys_in_its_order():
    """`diff config/a.yaml config/b.yaml` teaches only when both have the same keys in the same order."""
    others = [*ROOT.glob("config/train_dpr_*.yaml"), *ROOT.glob("config/train_gcdpr_*.yaml")]
    assert len(others) >= 8
    for other in others:
        load_config("", SCHEMA, ["--config", str(other)])
        first, second = (list(yaml.safe_load(p.read_text())) for p in (ROOT / SCHEMA, other))
        assert first == second, other.name


def test_nothing_has_no_hash(tmp_path, monkeypatch):
    """Path("") is the folder one stands in: a run without a dev set must not depend on what lies there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert folder_hash("") == folder_hash("no-such/hub-name") == "" != folder_hash(".")


def test_a_hub_name_is_an_identity():
    """A run started from one hub model does not go on from another, however alike their names begin."""
    names = ("Luyu/co-condenser-wiki", "Luyu/co-condenser-marco")
    assert len({weights_hash(name)[:16] for name in names}) == 2
