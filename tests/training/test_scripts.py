"""The scripts of the bundles: they say how what lies in the repository was made, and they run."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from matvae_server import bundle
from matvae_training import cli
from matvae_training.arguments import config, network, parser

pytestmark = pytest.mark.usefixtures("heads_of_few_steps")

BUNDLES = {
    "fashion-mnist": "server/matvae_server/bundles/fashion-mnist",
    "mnist": "bundles/mnist",
    "cifar10": "bundles/cifar10",
}


def fit_command(repository, name):
    """What the script runs last, with the placeholders of a card, and without the options that one may add."""
    text = (repository / "training" / "bundles" / f"{name}.sh").read_text().replace("\\\n", " ")
    *first, line = re.findall(r"^ *matvae-train fit .*", text, re.MULTILINE)
    assert bool(first) == ('--neighbours-of "$out-first"' in line)
    line = line.replace('"$out-first"', "FIRST")
    for variable, placeholder in (('"$data_root"', "DATA_ROOT"), ('"$out"', "OUT"), ('"${@:3}"', "")):
        assert variable in line
        line = line.replace(variable, placeholder)
    return shlex.split(line)[1:]


def test_every_bundle_has_a_script_and_every_script_a_bundle_to_make(repository):
    scripts = {path.stem for path in (repository / "training" / "bundles").glob("*.sh")}
    assert scripts == set(BUNDLES)
    assert {path.name for path in (repository / "bundles").iterdir()} <= scripts


def shaping(options):
    """Those that shape a bundle; where a run keeps its metrics does not."""
    return {key: value for key, value in vars(options).items() if key not in ("log", "run", "resume", "tensorboard")}


@pytest.mark.parametrize("name", BUNDLES)
def test_the_script_is_the_command_on_the_card(repository, name):
    command = fit_command(repository, name)
    options = parser().parse_args(command)
    assert options.dataset == name
    loaded = bundle.load(repository / BUNDLES[name])
    on_card = parser().parse_args(shlex.split(loaded.card.provenance["command"])[1:])
    assert shaping(on_card) == shaping(options)


def noted(repository, tmp_path, script, *words, **environment):
    """The commands of a script, which are not run, and what it said."""
    tool, notes = tmp_path / "bin" / "matvae-train", tmp_path / "commands"
    tool.parent.mkdir(exist_ok=True)
    notes.write_text("")
    note = "import json, sys; print(json.dumps(sys.argv[1:]))"
    tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{note}" "$@" >>{shlex.quote(str(notes))}\n')
    tool.chmod(0o755)
    run = subprocess.run(
        [repository / "training" / script, *words],
        env={**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in notes.read_text().splitlines()], run.stdout


def test_what_the_gpu_script_asks_for(repository, tmp_path):
    commands, _ = noted(repository, tmp_path, "gpu.sh", "data", tmp_path / "out", "--epochs", "3", DEVICE="cuda")
    assert len(commands) == 3 * 2 + 2 * 2 + 1 + 2  # pack and evaluate; two passes of two; one; cards of two
    for options in map(parser().parse_args, commands):
        if options.command == "fit":
            asked = config(options)
            asked.check_weights(network(options).prefixes)
            views = asked.objective.consistency == "contrast-cosine"
            assert views == (options.dataset == "cifar10")
            assert (options.device, options.compile, options.epochs) == ("cuda", True, 3)
            assert options.residual_blocks == (2 if options.dataset == "cifar10" else 0)
        if options.command == "evaluate":
            assert options.device == "cuda"


def test_the_gpu_script_leaves_out_what_is_scored(repository, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "fashion-mnist.json").write_text("{}")
    (out / "cifar10.json").write_text("")  # a disk that was full
    commands, said = noted(repository, tmp_path, "gpu.sh", "data", out)
    assert [command[2] for command in commands if command[0] == "pack"] == ["mnist", "cifar10"]
    assert not any("fashion-mnist" in word for command in commands for word in command)
    assert f"fashion-mnist: done, {out / 'fashion-mnist.json'} is there" in said


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("equals", [False, True])
def test_both_passes_have_a_run_of_their_own_and_a_whole_first_one_is_not_repeated(repository, tmp_path, name, equals):
    out, run = tmp_path / "out", tmp_path / "second.run"

    def fits(*more):
        words = [f"--run={run}"] if equals else ["--run", run]
        commands, _ = noted(repository, tmp_path, f"bundles/{name}.sh", "data", out, *words, *more)
        asked = [parser().parse_args(command) for command in commands if command[0] == "fit"]
        return [(each.out, each.run) for each in asked]

    first, second = (tmp_path / "out-first", tmp_path / "out-first.run"), (out, run)
    assert fits("--resume") == [first, second], "there is none yet"
    first[0].mkdir()
    assert fits("--resume") == [first, second], "it is not whole: its card is missing"
    (first[0] / "card.json").write_text("{}")
    assert fits("--resume") == [second]
    assert fits() == [first, second], "not asked to go on"


def test_the_gpu_script_on_a_cpu(repository, data_root, tmp_path):
    """Its commands are run one after the other in this process, which has torch loaded."""
    out = tmp_path / "out"
    # Two prefixes and narrow layers: all parts, in seconds.
    words = ["--epochs", "1", "--prefixes", "2,4", "--conv-channels", "4,4", "--decoder-hidden", "8", "--threads", "1"]
    commands, said = noted(
        repository, tmp_path, "gpu.sh", data_root, out, *words, DEVICE="cpu", DATASETS="fashion-mnist"
    )
    assert re.search(r"^fashion-mnist: \d+ s$", said, re.MULTILINE)
    assert [command[0] for command in commands] == ["pack", "fit", "fit", "evaluate"]
    for command in commands:
        assert cli.main(command) == 0
    made, first = (bundle.load(out / name).card for name in ("fashion-mnist", "fashion-mnist-first"))
    assert made.network.prefixes == (2, 4)
    assert json.loads(made.provenance["neighbours_of"])["fingerprint"] == first.fingerprint
    scores = json.loads((out / "fashion-mnist.json").read_text())["scores"]
    assert len(scores["mlp"]["4"]["values"]) == 3
    assert (out / "fashion-mnist.run" / "metrics.jsonl").read_text().count("\n") == 1
