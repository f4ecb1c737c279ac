"""Runs that are killed, blow up or find the disk full: what is left, and how they go on."""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from matvae_server import bundle
from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training import cli, device
from matvae_training.checkpoint import Checkpoint
from matvae_training.config import OBJECTIVES, FitConfig, FitError
from matvae_training.fit import fit, nested
from matvae_training.run import Run

pytestmark = pytest.mark.usefixtures("heads_of_few_steps")

SMALL = NetworkConfig(
    height=8, width=8, conv_channels=(4, 4), hidden=16, decoder_hidden=16, dimensions=8, prefixes=(2, 4, 8)
)
CONFIG = FitConfig(epochs=4, batch_size=8, prefix_weights=(1.0,) * 3, objective=OBJECTIVES["multitask"])
CONFIGS = {
    "multitask": CONFIG,
    "neighbours": dataclasses.replace(CONFIG, objective=OBJECTIVES["mmd-vae-neighbours"]),
    "views": dataclasses.replace(CONFIG, objective=OBJECTIVES["mmd-vae-contrast"]),
    "bfloat16": dataclasses.replace(CONFIG, bfloat16=True),
}
STEPS = 16  # 4 epochs of 4


def data():
    images = torch.randint(0, 256, (32, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(32) % 4


def train(directory, report=lambda progress: None, config=CONFIG, *, resume=False):
    """The losses by step, and the trained model."""
    run = Run(directory, {"config": json.dumps(dataclasses.asdict(config))}, resume=resume)
    images, labels = data()
    losses = {}

    def see(progress):
        losses[progress.step] = progress.terms.loss.item()
        if progress.step % progress.steps_per_epoch == 0:
            run.record(progress.record())
        report(progress)

    return losses, fit(images, SMALL, config, see, labels=labels, checkpoint=run.checkpoint)


def metrics(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_run
def report(progress):
    if progress.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
test_run.train(Path(sys.argv[2]), report, test_run.CONFIGS[sys.argv[4]])
"""


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("multitask", 2),  # in the first epoch
        ("multitask", 8),  # with its metrics, but before its checkpoint
        *((name, 11) for name in CONFIGS),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, name, step):
    whole, expected = train(tmp_path / "whole", config=CONFIGS[name])
    arguments = [os.path.dirname(__file__), str(tmp_path / "killed"), str(step), name]  # noqa: PTH120
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    rest, model = train(tmp_path / "killed", config=CONFIGS[name], resume=True)
    done = step // 4 * 4 if step % 4 else step - 4
    assert rest == {at: loss for at, loss in whole.items() if at > done}
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


def test_resuming_what_is_finished_changes_nothing(tmp_path):
    _, expected = train(tmp_path)
    losses, model = train(tmp_path, resume=True)
    assert losses == {}
    assert [line["step"] for line in metrics(tmp_path)] == [4, 8, 12, 16]
    images, _ = data()
    assert torch.equal(model.encoder(images), expected.encoder(images))


def test_a_run_is_not_overwritten_nor_continued_by_another(tmp_path):
    train(tmp_path)
    with pytest.raises(FitError, match="holds a run already: go on with it by --resume"):
        train(tmp_path)
    with pytest.raises(FitError, match="is of another run: its config is"):
        train(tmp_path, config=FitConfig(epochs=5, batch_size=8, prefix_weights=(1.0,) * 3), resume=True)


def test_a_run_goes_on_elsewhere_and_keeps_its_legs(tmp_path):
    there = {"config": '{"device": "cuda", "compile": true, "seed": 0}', "hardware": "a GPU", "command": "fit"}
    here = {"config": '{"device": "cpu", "compile": false, "seed": 0}', "hardware": "a CPU", "command": "fit --resume"}
    again = there | {"command": "fit --resume"}
    assert Run(tmp_path, there, resume=False).legs == [there]
    assert Run(tmp_path, again, resume=True).legs == [there]
    assert Run(tmp_path, here, resume=True).legs == [there, here]
    assert Run(tmp_path, here, resume=True).legs == [there, here]
    assert Run(tmp_path, again, resume=True).legs == [there, here, again]
    with pytest.raises(FitError, match=r"is of another run: its config is \{\"seed\": 0\}, not \{\"seed\": 1\}"):
        Run(tmp_path, here | {"config": '{"device": "cpu", "compile": false, "seed": 1}'}, resume=True)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_checkpoint_of_a_gpu_is_read_on_a_cpu_and_the_other_way_round(tmp_path, monkeypatch, kind):
    """There is no GPU where this runs: what would be asked of it is kept."""
    train(tmp_path)
    path, asked = tmp_path / "checkpoint.pt", []
    state = torch.load(path, weights_only=True)
    if kind == "cpu":
        state["random"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, path)
    monkeypatch.setattr(device, "of", lambda _: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *arguments: asked.append(arguments))
    model = MatVae(SMALL)
    objective = nested(CONFIG, SMALL, 4).learned()
    optimiser = torch.optim.AdamW([*model.parameters(), *objective.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=STEPS)
    assert Checkpoint(path).load(model, objective, optimiser, schedule) == STEPS
    assert not asked


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "is not what a run writes"), ("[", "is not what a run"), ('{"format": 2}', "use a newer matvae")],
)
def test_a_run_directory_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(FitError, match=message):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", torch.zeros(3)])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    train(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(FitError, match=r"checkpoint\.pt is no checkpoint of this run"):
        train(tmp_path, resume=True)


def test_metrics_that_no_run_wrote_are_named(tmp_path):
    run = Run(tmp_path, {}, resume=False)
    (tmp_path / "metrics.jsonl").write_text("what is this?\n")
    with pytest.raises(FitError, match=r"metrics\.jsonl is not what a run writes"):
        run.record({"step": 4})


@pytest.mark.parametrize("epochs", [1, 2])
def test_codes_that_blow_up_in_the_last_step_of_an_epoch_are_told_and_not_saved(tmp_path, epochs):
    run = Run(tmp_path, {}, resume=False)
    images, labels = data()
    wild = dataclasses.replace(CONFIG, epochs=epochs, batch_size=32, learning_rate=1e30)
    with pytest.raises(FitError, match="step 1: its codes are not finite; try a lower learning rate"):
        fit(images, SMALL, wild, lambda progress: None, labels=labels, checkpoint=run.checkpoint)
    assert not run.checkpoint.path.exists()


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path):
    good = {}

    def poison(progress):
        if progress.step == 4:
            return
        if progress.step == 5:
            good["checkpoint"] = (tmp_path / "checkpoint.pt").read_bytes()
        if progress.step == 6:
            images[:] = float("nan")

    images, labels = data()
    images = images.float()
    run = Run(tmp_path, {}, resume=False)
    with pytest.raises(FitError, match=r"step 7: the \w+ of prefix 2 is nan; .*the checkpoint of step 4 is kept in"):
        fit(images, SMALL, CONFIG, poison, labels=labels, checkpoint=run.checkpoint)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good["checkpoint"]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=9)
    checkpoint.save(4, model, torch.nn.ModuleDict(), optimiser, schedule)
    before = checkpoint.path.read_bytes()
    with torch.no_grad():
        model.bias[0] = float("inf")
    with pytest.raises(FitError, match=r"step 8: bias holds values that are not finite.*step 4 is kept"):
        checkpoint.save(8, model, torch.nn.ModuleDict(), optimiser, schedule)
    assert checkpoint.path.read_bytes() == before


@contextlib.contextmanager
def full_disk(largest):
    """No file of this process can grow beyond so many bytes; Python ignores the signal, so that writing raises."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path):
    with contextlib.ExitStack() as stack:

        def fill(progress):
            if progress.step == 5:
                stack.enter_context(full_disk(4096))

        with pytest.raises(FitError, match=r"step 8: .* cannot be written: .*; the checkpoint of step 4 is kept in"):
            train(tmp_path, fill)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.jsonl", "run.json"]
    rest, _ = train(tmp_path, resume=True)
    assert min(rest) == 5
    assert metrics(tmp_path)[-1]["step"] == STEPS


def test_the_command_is_killed_and_resumed_to_a_bundle(data_root, tmp_path):
    options = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "bundle")]
    # More epochs than are trained before the kill arrives.
    options += ["--epochs", "8", "--batch-size", "300", "--prefixes", "2,4", "--threads", "1"]
    options += ["--run", str(tmp_path / "run")]
    log = tmp_path / "log.jsonl"
    options += ["--log", str(log)]
    with subprocess.Popen(
        [sys.executable, "-m", "matvae_training.cli", *options], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 1, "):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    log.write_text("what was logged before\n")
    assert cli.main(options) == 2, "not without being asked to"
    assert cli.main([*options, "--resume"]) == 0
    logged = log.read_text().splitlines()
    assert logged[0] == "what was logged before"
    assert json.loads(logged[-1])["epoch"] == 8
    assert bundle.load(tmp_path / "bundle").card.name == "fashion-mnist"
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 4, 6, 8, 10, 12, 14, 16]
    known = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {"command", "config", "network", "seed", "commit", "versions", "hardware", "data_sha256"} <= known.keys()
    assert str(tmp_path) not in json.dumps(known)


def test_resume_needs_a_run(tmp_path, capsys):
    assert cli.main(["fit", "--dataset", "mnist", "--data-root", "d", "--out", "o", "--resume"]) == 2
    assert "--resume needs --run" in capsys.readouterr().err
