"""Data sets that torchvision reads and downloads, and what is said where it is missing or cannot be used."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_alone
from cases_recipes import CIFAR, load, train, write_cifar, write_folder, write_mnist

from gradrep_kernels.recipes.data import library
from gradrep_kernels.recipes.data.load import load_data
from gradrep_kernels.recipes.errors import InputError

needs_torchvision = torchvision_alone.needed
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
COUNT = 7  # images of a file


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_pickled(root, kind: str) -> dict[str, np.ndarray]:
    """CIFAR as torchvision leaves it; the pixels [N, 3072] of each file by its name."""
    folder = root / FOLDERS[kind]
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"] if kind == "cifar10" else ["train", "test"]
    labels = "labels" if kind == "cifar10" else "fine_labels"
    pixels = {}
    for n, name in enumerate(names):
        pixels[name] = np.random.default_rng(n).integers(0, 256, (COUNT, 3072), dtype=np.uint8)
        held = {"data": pixels[name], labels: [(3 * n + i) % 10 for i in range(COUNT)]}
        (folder / name).write_bytes(pickle.dumps(held))
    classes = 10 if kind == "cifar10" else 100
    meta, key = ("batches.meta", "label_names") if kind == "cifar10" else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({key: [f"class {n}" for n in range(classes)]}))
    return pixels


def as_published(monkeypatch, root, kind: str) -> None:
    """Make torchvision take the files that are there for the published ones."""
    data_set = getattr(importlib.import_module("torchvision.datasets"), kind.upper())
    folder = root / FOLDERS[kind]
    for name in ("train_list", "test_list"):
        files = [[file, md5(folder / file)] for file, _ in getattr(data_set, name)]
        monkeypatch.setattr(data_set, name, files)
    monkeypatch.setattr(data_set, "meta", {**data_set.meta, "md5": md5(folder / data_set.meta["filename"])})


@needs_torchvision
@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("inside", [False, True])
def test_pickled_cifar_is_recognised_and_read(tmp_path, monkeypatch, kind, inside):
    pixels = write_pickled(tmp_path, kind)
    as_published(monkeypatch, tmp_path, kind)
    data = load(f"{kind}:{tmp_path / FOLDERS[kind] if inside else tmp_path}")
    training = np.concatenate([p for name, p in pixels.items() if "test" not in name])
    assert (len(data.train), len(data.test)) == (len(training), COUNT)
    assert data.classes[:2] == ("class 0", "class 1")
    x = data.train.read(torch.arange(len(training)))
    np.testing.assert_array_equal(x.reshape(len(training), -1).numpy(), training.astype(np.float32) / 255)
    assert data.train.labels[:COUNT].tolist() == [i % 10 for i in range(COUNT)]
    np.testing.assert_allclose(data.mean, training.reshape(-1, 3, 1024).mean((0, 2)) / 255, atol=1e-6)
    one = data.test.decoded(2)
    assert (one.shape, one.dtype) == ((3, 32, 32), torch.uint8)


@needs_torchvision
def test_the_binary_form_is_taken_where_both_are(tmp_path):
    write_pickled(tmp_path, "cifar10")
    write_cifar(tmp_path, "cifar10")
    assert len(load(f"cifar10:{tmp_path}").test) == 4


PICKLED_FAULTS = {
    "missing": ("data_batch_4", lambda path: path.unlink(), "no such file; --download gets cifar10"),
    "truncated": ("test_batch", lambda path: path.write_bytes(path.read_bytes()[:-5]), "not the published file"),
    "classes": ("batches.meta", lambda path: path.write_bytes(b"no"), "truncated, changed or another (2 bytes, whose"),
}


@needs_torchvision
@pytest.mark.parametrize("fault", PICKLED_FAULTS)
def test_a_wrong_pickled_file_is_named_in_one_line(tmp_path, monkeypatch, fault):
    name, break_it, said = PICKLED_FAULTS[fault]
    write_pickled(tmp_path, "cifar10")
    as_published(monkeypatch, tmp_path, "cifar10")
    break_it(tmp_path / FOLDERS["cifar10"] / name)
    with pytest.raises(InputError) as wrong:
        load(f"cifar10:{tmp_path}")
    assert str(tmp_path / FOLDERS["cifar10"] / name) in str(wrong.value)
    assert said in str(wrong.value)
    assert "\n" not in str(wrong.value)


def write_svhn(root, monkeypatch) -> dict[str, np.ndarray]:
    scipy_io = pytest.importorskip("scipy.io")
    svhn = importlib.import_module("torchvision.datasets").SVHN
    split, pixels = dict(svhn.split_list), {}
    for n, part in enumerate(("train", "test")):
        url, name, _ = split[part]
        pixels[part] = np.random.default_rng(n).integers(0, 256, (32, 32, 3, COUNT), dtype=np.uint8)
        labels = np.array([10, 1, 2, 9, 10, 5, 7], dtype=np.uint8)[:, None]
        scipy_io.savemat(root / name, {"X": pixels[part], "y": labels})
        split[part] = [url, name, md5(root / name)]
    monkeypatch.setattr(svhn, "split_list", split)
    return pixels


@needs_torchvision
def test_svhn_is_read_with_ten_as_nought(tmp_path, monkeypatch):
    pixels = write_svhn(tmp_path, monkeypatch)
    data = load(f"svhn:{tmp_path}")
    assert data.train.labels.tolist() == [0, 1, 2, 9, 0, 5, 7]
    expected = pixels["test"].transpose(3, 2, 0, 1).astype(np.float32) / 255
    np.testing.assert_array_equal(data.test.read(torch.arange(COUNT)).numpy(), expected)
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB")
    with pytest.raises(InputError, match=r"test_32x32\.mat: not the published file"):
        load(f"svhn:{tmp_path}")
    (tmp_path / "train_32x32.mat").unlink()
    with pytest.raises(InputError, match=r"train_32x32\.mat: no such file; --download gets svhn"):
        load(f"svhn:{tmp_path}")


# ---- downloads: the network is played


@pytest.fixture
def network(monkeypatch):
    """What torchvision asked for; `network.serve` is called with the folder to leave files in."""

    played = types.SimpleNamespace(asked=[], serve=lambda folder: None)

    def download(url, root=None, *_, download_root=None, **__):
        played.asked.append(url)
        played.serve(download_root or root)

    for module, name in (
        ("cifar", "download_and_extract_archive"),
        ("mnist", "download_and_extract_archive"),
        ("svhn", "download_url"),
    ):
        monkeypatch.setattr(importlib.import_module(f"torchvision.datasets.{module}"), name, download)
    return played


@needs_torchvision
def test_download_leaves_what_is_then_read(tmp_path, network, monkeypatch):
    def serve(folder):
        write_pickled(tmp_path / "new", "cifar100")
        as_published(monkeypatch, tmp_path / "new", "cifar100")

    network.serve = serve
    data = load_data(f"cifar100:{tmp_path / 'new'}", download=True)
    assert (len(data.train), len(network.asked)) == (COUNT, 1)
    load_data(f"cifar100:{tmp_path / 'new'}", download=True)
    assert len(network.asked) == 1  # all is there


@needs_torchvision
@pytest.mark.parametrize("kind", ["mnist", "fashion"])
def test_download_of_idx_files(tmp_path, network, kind):
    unpack = importlib.import_module("torchvision.datasets.utils").extract_archive

    def serve(folder):
        for packed in write_mnist(Path(folder)).glob("*.gz"):  # torchvision leaves them beside what was in them
            unpack(str(packed), folder)

    network.serve = serve
    data = load_data(f"{kind}:{tmp_path}", download=True)
    assert (len(data.train), data.name, bool(network.asked)) == (40, kind, True)


@needs_torchvision
@pytest.mark.parametrize(("kind", "write"), [("cifar10", write_cifar), ("fashion", lambda root, _: write_mnist(root))])
def test_nothing_is_downloaded_where_other_forms_are_there(tmp_path, network, kind, write):
    write(tmp_path, kind)
    load_data(f"{kind}:{tmp_path}", download=True)
    assert not network.asked


@needs_torchvision
@pytest.mark.parametrize("kind", ["cifar10", "svhn"])
def test_a_download_that_fails_is_one_line(tmp_path, network, kind):
    def serve(folder):
        raise OSError("no route\nto host")

    network.serve = serve
    with pytest.raises(InputError) as wrong:
        load_data(f"{kind}:{tmp_path}", download=True)
    assert str(wrong.value) == f"{tmp_path}: {kind} cannot be downloaded: no route to host"


@pytest.mark.parametrize("source", ["digits", "folder:/nowhere"])
def test_what_nobody_offers_is_not_downloaded(source):
    with pytest.raises(InputError, match=r"--download is for cifar10:DIR, .*svhn:DIR, not for"):
        load_data(source, download=True)


# ---- without torchvision


@pytest.fixture(params=["missing", "built for another torch"])
def no_torchvision(request, monkeypatch):
    """Whatever is installed, it cannot be imported."""

    def import_module(name, original=importlib.import_module):
        if name.partition(".")[0] != "torchvision":
            return original(name)
        if request.param == "missing":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(library.importlib, "import_module", import_module)
    return "pip install torchvision" if request.param == "missing" else "nms does not exist"


def test_what_needs_it_says_what_to_install(tmp_path, no_torchvision):
    (tmp_path / FOLDERS["cifar10"]).mkdir()
    write_folder(tmp_path)
    wanted = {
        "cifar10": {}, "svhn": {}, "folder": {"augment": ("resized", "flip")}, "mnist": {"download": True},
    }  # fmt: skip
    for kind, more in wanted.items():
        with pytest.raises(InputError) as wrong:
            load_data(f"{kind}:{tmp_path}", **more)
        assert "needs torchvision" in str(wrong.value)
        assert no_torchvision in str(wrong.value)
        assert torch.__version__ in str(wrong.value)
        assert "\n" not in str(wrong.value)
    with pytest.raises(InputError, match=r"--augment resized needs torchvision.*crop, flip, cutout need none"):
        load_data(f"folder:{tmp_path}", augment=("resized", "flip"))


def test_what_needs_none_is_read(tmp_path, no_torchvision):
    for kind in CIFAR:
        load_data(f"{kind}:{write_cifar(tmp_path / kind, kind)}", augment=("crop", "flip", "cutout"))
    load_data(f"mnist:{write_mnist(tmp_path / 'mnist')}")
    load_data(f"folder:{write_folder(tmp_path / 'folder')}", 8, augment=("crop", "flip"))
    load_data("digits")


def test_no_command_imports_it_unless_it_is_needed(tmp_path):
    source = f"mnist:{write_mnist(tmp_path / 'data')}"
    code = "import sys; from gradrep_kernels.recipes.data import load_data; load_data(sys.argv[1], augment=('crop',)); "
    code += "from gradrep_kernels.recipes.data import loader; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, source], check=True)


@needs_torchvision
def test_a_whole_run_on_what_torchvision_left(tmp_path, monkeypatch, no_pictures):
    write_pickled(tmp_path / "data", "cifar10")
    as_published(monkeypatch, tmp_path / "data", "cifar10")
    train(f"cifar10:{tmp_path / 'data'}", tmp_path, "--name", "x", "--recipe", "sgd", "--epochs", "1")
    assert (tmp_path / "x" / "weights" / "sgd-seed0.pt").exists()
