"""Fewer prefixes a step, early stopping, compiled steps, TensorBoard: what each changes, and what it must not."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training import allocator, cli, device
from matvae_training import fit as training
from matvae_training.config import OBJECTIVES, FitConfig, FitError
from matvae_training.data import Split, load
from matvae_training.fit import fit, nested
from matvae_training.neighbours import partners_of
from matvae_training.run import Run
from matvae_training.stopping import Stopping, validation_loss

SMALL = NetworkConfig(
    height=8, width=8, conv_channels=(4, 4), hidden=16, decoder_hidden=16, dimensions=16, prefixes=(2, 4, 8, 16)
)
CONFIG = FitConfig(epochs=4, batch_size=8, prefix_weights=(3.0, 2.0, 1.0, 0.5))


def images(count=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 8, 8, 1), dtype=torch.uint8, generator=generator)


def labels(count=32):
    return torch.arange(count) % 4


def losses(config, checkpoint=None, stopping=None, report=lambda progress: None):
    seen = {}

    def see(progress):
        seen[progress.step] = progress.terms.loss.item()
        report(progress)

    model = fit(images(), SMALL, config, see, labels=labels(), checkpoint=checkpoint, stopping=stopping)
    return seen, model


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_of_a_few_prefixes_are_those_of_all(name):
    objective = nested(dataclasses.replace(CONFIG, objective=OBJECTIVES[name]), SMALL, 4)
    model = MatVae(SMALL).eval()
    found = {}
    for chosen in (None, (1, 3)):
        torch.manual_seed(1)
        found[chosen] = objective(model, images(), labels(), 0.3, chosen, partners=images().flip(0))
    assert found[1, 3].prefixes == (4, 16)
    for part, value in found[None].parts.items():
        torch.testing.assert_close(found[1, 3].parts[part], value[[1, 3]])


class Copies(TorchFunctionMode):
    """Calls that bring what the CPU has to another device, for each of which a GPU is waited for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "cpu":
            given = [each for each in args if isinstance(each, torch.Tensor)]
            made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
            if made or (given and all(each.device.type == "cpu" for each in given)):
                self.seen.append(function)
        return result


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_brings_nothing_to_the_device(name, monkeypatch):
    """On `meta`, which is any device without values: what would have to be counted first is an error there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no `meta`
    where = torch.device("meta")
    objective = nested(dataclasses.replace(CONFIG, objective=OBJECTIVES[name]), SMALL, 4)
    objective.learned().to(where)
    model = MatVae(SMALL).to(where)
    pixels, classes, rows = images().to(where), labels().to(where), torch.arange(32, device=where)
    for _ in range(2):  # the first brings what all need
        with Copies() as copies:
            partners = partners_of(pixels, torch.zeros(32, 5, dtype=torch.int64, device=where), rows)
            objective(model, pixels, classes, 0.3, (1, 3), partners=partners).loss.backward()
    assert copies.seen == []


def test_what_is_kept_from_an_evaluation_serves_training():
    def loss():
        return nested(dataclasses.replace(CONFIG, prefix_weights=(7.0, 5.0, 3.0, 1.0)), SMALL, 0)(model, images()).loss

    model = MatVae(SMALL)
    with torch.inference_mode():
        loss()
    loss().backward()


def test_a_decoder_of_a_few_prefixes_computes_no_other():
    decoder = MatVae(SMALL).decoder
    codes = torch.randn(5, 16)
    torch.testing.assert_close(decoder(codes, (0, 3)), decoder(codes)[[0, 3]])
    decoder(codes, (0, 3)).sum().backward()
    assert [layer.weight.grad is None for layer in decoder.inputs] == [False, True, True, False]


@pytest.mark.parametrize("k", [1, 2])
def test_the_loss_of_drawn_prefixes_is_that_of_all_on_average(k):
    objective = nested(dataclasses.replace(CONFIG, prefixes_per_step=k), SMALL, 0)
    model = MatVae(SMALL).eval()
    torch.manual_seed(0)
    drawn = {objective.draw() for _ in range(200)}
    assert len(drawn) == math.comb(3, k)
    assert all(len(choice) == k + 1 and choice[-1] == 3 and list(choice) == sorted(choice) for choice in drawn)

    def loss(chosen):
        torch.manual_seed(1)
        return objective(model, images(), None, 0.0, chosen).loss

    torch.testing.assert_close(torch.stack([loss(choice) for choice in drawn]).mean(), loss(None))


@pytest.mark.parametrize("k", [None, 3, 9])
def test_where_all_prefixes_are_taken_nothing_is_drawn(k):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    everything = dataclasses.replace(CONFIG, prefixes_per_step=k, compile=True)  # one graph, so it may be compiled
    assert nested(everything, SMALL, 0).draw() is None
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_prefixes_train_and_a_killed_run_goes_on_with_the_same(tmp_path):
    config = dataclasses.replace(CONFIG, prefixes_per_step=1, objective=OBJECTIVES["multitask"])
    whole, _ = losses(config, Run(tmp_path / "whole", {}, resume=False).checkpoint)

    def interrupt(progress):
        if progress.step == 11:
            raise KeyboardInterrupt

    run = Run(tmp_path / "killed", {}, resume=False)
    with pytest.raises(KeyboardInterrupt):
        losses(config, run.checkpoint, report=interrupt)
    rest, _ = losses(config, Run(tmp_path / "killed", {}, resume=True).checkpoint)
    assert rest == {step: loss for step, loss in whole.items() if step > 8}


def test_a_record_says_of_which_prefixes_its_terms_are():
    records = []
    losses(dataclasses.replace(CONFIG, prefixes_per_step=2), report=lambda progress: records.append(progress.record()))
    for record in records:
        assert len(record["prefixes"]) == len(record["reconstruction"]) == 3
        assert record["prefixes"][-1] == 16
    assert len({tuple(record["prefixes"]) for record in records}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes_per_step": 0}, "prefixes_per_step must be at least 1"),
        ({"prefixes_per_step": 1, "compile": True}, "take prefixes_per_step or compile"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(FitError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_processor_that_imitates_bfloat16_is_told_of(data_root, tmp_path, monkeypatch, capsys):
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "bundle")]
    words += ["--batch-size", "601", "--bfloat16"]  # more than there are images: it ends where training would begin
    told = "this processor has no bfloat16 and imitates it, many times slower than float32: take --no-bfloat16"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err
    assert cli.main([*words, "--no-bfloat16"]) == 2  # as behind a script that asks for it
    assert told not in capsys.readouterr().err
    assert not device.emulates_bfloat16(torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(FitError, match="no GPU that torch can use: take --device cpu"):
        fit(images(), SMALL, dataclasses.replace(CONFIG, device="cuda"), lambda progress: None)


@pytest.fixture
def captured(monkeypatch):
    """torch.compile as far as one whole graph, which is then run as it is: no compiler for C++ is needed."""
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, *, mode, dynamic, compile=torch.compile: compile(
            function, fullgraph=True, backend="eager", dynamic=dynamic
        ),
    )


@pytest.mark.parametrize("name", ["mmd-vae", "capacity-vae", "mmd-vae-neighbours", "mmd-vae-contrast-cosine"])
def test_a_compiled_step_is_one_graph_for_all_steps_and_the_same(captured, name):
    """With torch 2.11, a function of one's own whose forward changes tensors in place fails here: its gradient is 0."""
    network = dataclasses.replace(SMALL, prefixes=(2, 16))
    config = dataclasses.replace(CONFIG, epochs=2, prefix_weights=(1.0, 1.0), objective=OBJECTIVES[name])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = {False: [], True: []}
    for compiled, each in seen.items():
        changed = dataclasses.replace(config, compile=compiled)
        fit(images(), network, changed, lambda progress, each=each: each.append(progress.terms.loss.item()))
    assert seen[True] == pytest.approx(seen[False], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("where", "needs"), [("cpu", r"a C\+\+ compiler"), ("cuda", "Triton, a C compiler and the head")]
)
def test_a_step_that_cannot_be_compiled_says_what_to_do(monkeypatch, where, needs):
    def broken(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(
        torch, "compile", lambda function, *, mode, dynamic, compile=torch.compile: compile(function, backend=broken)
    )
    torch._dynamo.reset()
    compute = device.compiled(lambda x: x + 1, torch.device(where))
    with pytest.raises(
        FitError, match=rf"torch\.compile failed .*: on a .PU it needs {needs}.*train without --compile"
    ):
        compute(torch.ones(2))


def test_a_way_back_that_cannot_be_compiled_says_so_too(monkeypatch):
    """It is compiled at the first step's gradient, when the loss was there already."""

    def broken(graph, inputs):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    forward_alone = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=broken)
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, *, mode, dynamic, compile=torch.compile: compile(function, backend=forward_alone),
    )
    with pytest.raises(FitError, match=r"torch\.compile failed .*no compiler.*train without --compile"):
        fit(
            images(),
            dataclasses.replace(SMALL, prefixes=(16,)),
            dataclasses.replace(CONFIG, compile=True, prefix_weights=(1.0,)),
            lambda progress: None,
        )


HELD = Split(images=images(40)[32:], labels=labels(8))


@pytest.fixture
def scripted(monkeypatch):
    """What `validation_loss` says is the script's entry; the weights of every epoch are kept beside it."""
    kept = []

    def say(objective, model, validation, *_):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return SCRIPT[len(kept) - 1]

    monkeypatch.setattr("matvae_training.stopping.validation_loss", say)
    return kept


SCRIPT = [3.0, 2.0, 2.5, 2.0, 1.0, 0.5]


def test_training_stops_when_patience_ends_and_keeps_the_best_weights(scripted):
    stopping = Stopping(HELD, 2)
    seen, model = losses(dataclasses.replace(CONFIG, epochs=6), stopping=stopping)
    assert max(seen) == 4 * 4, "an equal loss is no better one"
    assert (stopping.epoch, stopping.seen, stopping.loss) == (2, 4, 2.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, scripted[1][name]), name


def test_patience_that_does_not_end_still_keeps_the_best(scripted):
    stopping = Stopping(HELD, 9)
    seen, model = losses(dataclasses.replace(CONFIG, epochs=3), stopping=stopping)
    assert max(seen) == 3 * 4
    assert torch.equal(model.encoder.mean.weight, scripted[1]["encoder.mean.weight"])


@pytest.mark.parametrize("step", [7, 13])
def test_stopping_goes_on_where_it_was_killed(tmp_path, scripted, step):
    def interrupt(progress):
        if progress.step == step:
            raise KeyboardInterrupt

    config = dataclasses.replace(CONFIG, epochs=6)
    with pytest.raises(KeyboardInterrupt):
        losses(config, Run(tmp_path, {}, resume=False).checkpoint, Stopping(HELD, 2), interrupt)
    stopping = Stopping(HELD, 2)
    seen, model = losses(config, Run(tmp_path, {}, resume=True).checkpoint, stopping)
    assert (min(seen), max(seen)) == (step // 4 * 4 + 1, 16)
    assert (stopping.epoch, stopping.seen) == (2, 4)
    best = model.encoder.mean.weight
    assert torch.equal(best, scripted[1]["encoder.mean.weight"])
    again, model = losses(config, Run(tmp_path, {}, resume=True).checkpoint, Stopping(HELD, 2))
    assert again == {}, "what has stopped is not taken up again"
    assert torch.equal(model.encoder.mean.weight, best)


@pytest.mark.parametrize("name", ["mmd-vae-contrast", "multitask"])
def test_the_validation_loss_repeats_itself_and_leaves_training_alone(name):
    config = dataclasses.replace(CONFIG, objective=OBJECTIVES[name], prefixes_per_step=1)
    objective = nested(config, SMALL, 4)
    model = MatVae(SMALL).train()
    state = torch.get_rng_state()
    first, again = (validation_loss(objective, model, HELD, 4) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    plain, watched = (losses(config, stopping=stopping)[0] for stopping in (None, Stopping(HELD, 99)))
    assert plain == watched


def test_a_validation_loss_that_is_no_number_ends_the_run(monkeypatch):
    monkeypatch.setattr("matvae_training.stopping.validation_loss", lambda *arguments: math.nan)
    with pytest.raises(FitError, match="epoch 1: the validation loss is nan"):
        losses(CONFIG, stopping=Stopping(HELD, 2))


def test_with_patience_the_test_set_is_measured_and_never_watched(data_root, tmp_path, monkeypatch):
    watched, written = [], {}

    def say(objective, model, validation, *_):
        watched.append(validation)
        return SCRIPT[len(watched) - 1]

    def write(model, **given):
        written.update(given)
        raise FitError("written")

    monkeypatch.setattr("matvae_training.stopping.validation_loss", say)
    monkeypatch.setattr("matvae_training.pipeline.write_bundle", write)
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "out")]
    words += ["--epochs", "9", "--batch-size", "250", "--prefixes", "2,4", "--conv-channels", "4,4"]
    assert cli.main([*words, "--decoder-hidden", "8", "--validation", "100", "--patience", "2", "--threads", "1"]) == 2
    whole = load("fashion-mnist", data_root)
    assert torch.equal(written["held"].images, whole.test.images)
    assert (written["split"], len(written["train"]), len(watched[0]), len(watched)) == ("test", 500, 100, 4)
    train = {image.numpy().tobytes() for image in written["train"].images}
    held = {image.numpy().tobytes() for image in watched[0].images}
    assert train | held == {image.numpy().tobytes() for image in whole.train.images}
    assert not train & held
    known = written["provenance"]
    assert known["split"] == "train on 500, stop by 100 (patience 2), evaluate on 90 (test)"
    assert known["stopped"] == "after 4 epochs; the weights are those of epoch 2, whose validation loss is 2.00000"


def test_tensorboard_reads_what_the_metrics_say(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    description = {}

    def train(epochs, resume):
        run = Run(tmp_path, description, resume=resume, tensorboard=True)

        def report(progress):
            if progress.step % 4 == 0:
                run.record(progress.record())
            if progress.step == 4 * epochs + 1:
                raise KeyboardInterrupt

        losses(CONFIG, run.checkpoint, Stopping(HELD, 9), report)

    with pytest.raises(KeyboardInterrupt):
        train(2, resume=False)
    train(4, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert {"loss", "validation_loss", "epoch", "reconstruction/16", "divergence/2"} <= set(
        accumulator.Tags()["scalars"]
    )
    for name, value in (("loss", lambda line: line["loss"]), ("divergence/2", lambda line: line["divergence"][0])):
        events = accumulator.Scalars(name)
        assert [event.step for event in events] == [4, 8, 12, 16]
        assert [event.value for event in events] == pytest.approx([value(line) for line in lines])


def test_without_tensorboard_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FitError, match=r"pip install 'matvae\[tensorboard\]'"):
        Run(tmp_path / "run", {}, resume=False, tensorboard=True)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensorboard"], "--tensorboard needs --run"),
        (["--patience", "2"], "patience needs validation images"),
        (["--prefixes-per-step", "1", "--compile"], "take prefixes_per_step or compile"),
    ],
)
def test_options_that_do_not_go_together(data_root, tmp_path, capsys, options, message):
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "out")]
    assert cli.main([*words, *options]) == 2
    assert message in capsys.readouterr().err


FAULTS = """
import resource, torch
from matvae_training.allocator import keep_memory, kept

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

print(keep_memory())
before = resident()
with kept():
    for step in range(30):
        if step == 10:
            begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("told", [{}, {"MALLOC_PERTURB_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_steps_keep_memory_unless_the_environment_says_how_to_allocate(told):
    other = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    words = [sys.executable, "-c", FAULTS]
    run = subprocess.run(words, env={**other, **told}, capture_output=True, text=True, check=True)
    kept, faults, left = run.stdout.split()
    assert kept == str(not told)
    assert (int(faults) < 500) == (not told)  # twenty times 80 MB are 400,000 pages of 4 kB, or 800 huge ones
    assert int(left) < 40_000_000, "not given back at the end"


def test_memory_is_kept_in_steps_alone(monkeypatch):
    """Kept in a search for neighbours, hardly a block that was freed fits the next."""
    told, search = [], training.nearest_images

    @contextlib.contextmanager
    def kept():
        told.append("kept")
        yield
        told.append("returned")

    monkeypatch.setattr(allocator, "kept", kept)
    monkeypatch.setattr(training, "nearest_images", lambda *given: (told.append("search"), search(*given))[1])
    neighbours = OBJECTIVES["mmd-vae-neighbours"]
    losses(dataclasses.replace(CONFIG, epochs=1, objective=neighbours), report=lambda _: told.append("step"))
    assert told == ["search", "kept", *["step"] * 4, "returned"]


@pytest.mark.parametrize(("words", "asked"), [(["pack", "--dataset", "mnist"], True), (["card", "nothing"], False)])
def test_what_computes_keeps_memory_and_what_reads_a_card_does_not(monkeypatch, tmp_path, words, asked):
    calls = []
    monkeypatch.setattr(cli, "keep_memory", lambda: calls.append(1))
    files = ["--data-root", str(tmp_path / "none.npz"), "--out", str(tmp_path / "out.npz")] if asked else []
    assert cli.main([*words, *files]) == 2
    assert bool(calls) == asked
