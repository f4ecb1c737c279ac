"""Images in files: CIFAR-10 in both of its layouts, and folders of one's own with all that can be wrong."""

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from matvae_server import bundle
from matvae_server.images import Limits, PixelBudget, decode
from matvae_training import cli, data
from matvae_training.config import CLASSES, DataError
from matvae_training.folder import read_folder

pytestmark = pytest.mark.usefixtures("heads_of_few_steps")

SHAPE = (16, 16, 3)


def picture(seed, size=(20, 30), mode="RGB", format="PNG"):
    """Noise over one colour of its own, as the bytes of a file."""
    rng = np.random.default_rng(seed)
    channels = {"RGB": (3,), "L": ()}[mode]
    pixels = np.clip(rng.integers(0, 200, channels) + rng.integers(0, 50, (*size, *channels)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8), mode).save(file, format)
    return file.getvalue()


@pytest.fixture
def files():
    """Three classes with sizes, modes and formats of all kinds."""
    kinds = [((20, 30), "RGB", "PNG"), ((16, 16), "RGB", "WEBP"), ((64, 40), "L", "JPEG")]
    made = {}
    for split, count in (("train", 4), ("test", 3)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for index in range(count):
                size, mode, format = kinds[index % 3]
                path = f"{split}/{name}/{index}.{format.lower()}"
                made[path] = picture(100 * label + index, size, mode, format)
    return made


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pack(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_folder_and_its_zip_are_read_alike_by_the_rule_of_the_server(files, tmp_path):
    (tmp_path / "folder/train").mkdir(parents=True)
    (tmp_path / "folder/train/notes.txt").write_text("of no class")
    (tmp_path / "folder/.hidden").write_text("")
    one = data.load("folder", write(tmp_path / "folder", files), SHAPE)
    other = data.load("folder", pack(tmp_path / "packed.zip", files), SHAPE)
    assert one.digest == other.digest
    assert one.classes == ("ant", "bee", "cat")
    assert one.unreadable == {}
    assert one.train.images.shape == (12, *SHAPE)
    assert one.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    limits = Limits()
    expected = decode(files["train/bee/0.png"], SHAPE, limits, PixelBudget(limits.max_image_pixels))
    assert np.array_equal(one.train.images[4].numpy(), expected)


def test_unreadable_files_are_left_out_and_named(files, tmp_path):
    files["train/bee/1.webp"] = b"not an image"
    files["test/cat/2.jpeg"] = files["test/cat/2.jpeg"][:40]
    found = data.load("folder", write(tmp_path, files), SHAPE)
    assert set(found.unreadable) == {"train/bee/1.webp", "test/cat/2.jpeg"}
    assert "not a PNG, JPEG or WEBP file" in found.unreadable["train/bee/1.webp"]
    assert (len(found.train), len(found.test)) == (11, 8)
    assert found.train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4


def test_a_damaged_member_of_a_zip_is_an_unreadable_file(files, tmp_path):
    path = pack(tmp_path / "images.zip", files)
    content = bytearray(path.read_bytes())
    content[content.index(files["train/ant/0.png"]) + 50] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32" in read_folder(path, SHAPE).unreadable["train/ant/0.png"]


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [(8, b"\x01\x00", "encrypted"), (10, b"\x63\x00", "compression"), (24, b"\xff\xff\xff\x7f", "2,147,483,647 bytes")],
)
def test_a_member_that_cannot_be_or_must_not_be_unpacked_is_an_unreadable_file(files, tmp_path, offset, value, says):
    path = pack(tmp_path / "images.zip", files)
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")  # the record of the first file: flags, method, size unpacked
    content[central + offset : central + offset + len(value)] = value
    path.write_bytes(content)
    (told,) = read_folder(path, SHAPE).unreadable.values()
    assert says in told


def test_a_member_is_unpacked_no_further_than_it_says(files, tmp_path):
    path = pack(tmp_path / "images.zip", files)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/ant/zeros.png", bytes(50_000_000))
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    content[central + 24 : central + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert list(read_folder(path, SHAPE).unreadable) == ["train/ant/zeros.png"]
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def only(files, *classes):
    return {name: content for name, content in files.items() if name.split("/")[1] in classes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: {}, "has no images in train/: expected train/<class>/"),
        (lambda files: {k: v for k, v in files.items() if k.startswith("train")}, "has no images in test/"),
        (lambda files: only(files, "bee"), "has one class, 'bee'"),
        (
            lambda files: {**files, "test/dog/0.png": files["test/ant/0.png"]},
            "test/ has a class that train/ lacks: 'dog'",
        ),
        (lambda files: {k: b"" if "bee" in k else v for k, v in files.items()}, "no image of train/bee can be read"),
        (lambda files: dict.fromkeys(files, b"?"), "can be read: train/ant/0.png: not a PNG"),
    ],
)
@pytest.mark.parametrize("make", [write, lambda path, files: pack(path / "x.zip", files)], ids=["folder", "zip"])
def test_what_no_classifier_can_be_trained_on(files, tmp_path, change, message, make):
    with pytest.raises(DataError, match=message):
        data.load("folder", make(tmp_path, change(files)), SHAPE)


def test_an_empty_class(files, tmp_path):
    write(tmp_path, files)
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(DataError, match="the class 'dog' has no files in train/"):
        data.load("folder", tmp_path, SHAPE)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more"])
def test_a_corrupt_archive(tmp_path, content):
    (tmp_path / "images.zip").write_bytes(content)
    with pytest.raises(DataError, match="neither a directory nor a zip file that can be read"):
        data.load("folder", tmp_path / "images.zip", SHAPE)


def test_a_root_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.load("folder", tmp_path / "nothing", SHAPE)


def test_only_a_folder_takes_a_shape(data_root):
    with pytest.raises(DataError, match="has images of one shape"):
        data.load("fashion-mnist", data_root, SHAPE)


@pytest.fixture
def cifar():
    return {
        f"{split}/{name}/{index}.webp": picture(10 * label + index, (32, 32), "RGB", "WEBP")
        for split in ("train", "test")
        for label, name in enumerate(CLASSES["cifar10"])
        for index in range(2)
    }


def test_cifar10_from_a_zip_of_images(cifar, tmp_path):
    path = pack(tmp_path / "cifar10.zip", cifar)
    found = data.load("cifar10", tmp_path)
    assert (found.name, found.classes) == ("cifar10", CLASSES["cifar10"])
    assert found.train.images.shape == (20, 32, 32, 3)
    assert found.digest == data.load("cifar10", path).digest


def test_cifar10_that_is_not_whole_is_refused(cifar, tmp_path):
    pack(tmp_path / "bad/cifar10.zip", cifar | {"train/ship/0.webp": b"?"})
    with pytest.raises(DataError, match=r"not CIFAR-10, or corrupt \(train/ship/0.webp: not a"):
        data.load("cifar10", tmp_path / "bad")
    pack(tmp_path / "few/cifar10.zip", only(cifar, "ship", "frog"))
    with pytest.raises(DataError, match="its classes are frog, ship"):
        data.load("cifar10", tmp_path / "few")


def test_cifar10_in_the_layout_of_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pixels = {name: rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for name in names}
    for name in names:
        content = {"data": pixels[name].reshape(4, -1), "labels": [3, 1, 4, 1]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES["cifar10"])}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)  # of the original files' MD5
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    found = data.load("cifar10", tmp_path)
    assert found.train.images.shape == (20, 32, 32, 3)
    assert torch.equal(found.test.images, torch.from_numpy(pixels["test_batch"]).permute(0, 2, 3, 1))
    assert found.test.labels.tolist() == [3, 1, 4, 1]


def test_a_folder_to_a_bundle(files, tmp_path, capsys):
    files |= {f"train/{name}/more{i}.png": picture(i) for name in ("ant", "bee", "cat") for i in range(8)}
    files["train/cat/bad.png"] = b"?"
    write(tmp_path / "insects", files)
    arguments = ["fit", "--dataset", "folder", "--data-root", str(tmp_path / "insects"), "--out", str(tmp_path / "out")]
    arguments += ["--epochs", "1", "--batch-size", "16", "--image-shape", "16,16,3", "--prefixes", "2,8"]
    assert cli.main(arguments) == 0
    assert "left out 1 files that cannot be read: train/cat/bad.png: not a PNG" in capsys.readouterr().err
    card = bundle.load(tmp_path / "out").card
    assert (card.name, card.classes, card.network.image_shape) == ("insects", ("ant", "bee", "cat"), SHAPE)
    assert card.provenance["unreadable_files"] == "1"


@pytest.mark.parametrize("shape", ["16,16", "16,16,2", "0,16,3", "a,b,c"])
def test_a_shape_that_is_none(shape, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--dataset", "folder", "--data-root", "d", "--out", "o", "--image-shape", shape])
    assert "--image-shape: must be" in capsys.readouterr().err
