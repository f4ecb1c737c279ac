"""The scripts of the bundles: they say how what lies in the repository was made, and they run."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from matvae_server import bundle
from matvae_training import model_card
from matvae_training.arguments import parser

BUNDLES = {
    "fashion-mnist": "server/matvae_server/bundles/fashion-mnist",
    "mnist": "bundles/mnist",
    "cifar10": "bundles/cifar10",
}


def fit_command(repository, name):
    """What the script runs, with the placeholders of a card, and without the options that one may add."""
    text = (repository / "training" / "bundles" / f"{name}.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^matvae-train fit .*", text, re.MULTILINE)
    for variable, placeholder in (('"$data_root"', "DATA_ROOT"), ('"$out"', "OUT"), ('"${@:3}"', "")):
        assert variable in line
        line = line.replace(variable, placeholder)
    return shlex.split(line)[1:]


def test_every_bundle_has_a_script_and_every_script_a_bundle_to_make(repository):
    scripts = {path.stem for path in (repository / "training" / "bundles").glob("*.sh")}
    assert scripts == set(BUNDLES)
    assert {path.name for path in (repository / "bundles").iterdir()} <= scripts


@pytest.mark.parametrize("name", BUNDLES)
def test_the_script_is_the_command_on_the_card(repository, name):
    command = fit_command(repository, name)
    options = parser().parse_args(command)
    assert options.dataset == name
    path = repository / BUNDLES[name]
    if path.is_dir():
        on_card = shlex.split(bundle.load(path).card.provenance["command"])[1:]
        assert parser().parse_args(on_card) == options


@pytest.fixture
def environment(tmp_path):
    """With a `matvae-train` that is this checkout's."""
    tool = tmp_path / "bin" / "matvae-train"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m matvae_training.cli "$@"\n')
    tool.chmod(0o755)
    return {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_gpu_script_runs_on_a_cpu(repository, data_root, tmp_path, environment):
    out = tmp_path / "out"
    environment |= {"DEVICE": "cpu", "DATASETS": "fashion-mnist"}
    # Two prefixes and narrow layers: all parts, in seconds.
    words = ["--epochs", "1", "--prefixes", "2,4", "--conv-channels", "4,4", "--decoder-hidden", "8", "--threads", "1"]
    run = subprocess.run(
        [repository / "training" / "gpu.sh", data_root, out, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^fashion-mnist: \d+ s$", run.stdout, re.MULTILINE)
    card = bundle.load(out / "fashion-mnist").card
    assert card.network.prefixes == (2, 4)
    assert model_card.render(card)
    scores = json.loads((out / "fashion-mnist.json").read_text())["scores"]
    assert len(scores["mlp"]["4"]["values"]) == 3
    assert (out / "fashion-mnist.run" / "metrics.jsonl").read_text().count("\n") == 1
