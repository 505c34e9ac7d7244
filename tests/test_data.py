"""Datasets, downloads that go wrong, label noise, samplers."""

import gzip
import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bilevel_lite import data
from bilevel_lite.data import cifar10

REAL = os.environ.get("BILEVEL_LITE_DATA")
needs_mnist = pytest.mark.skipif(
    not REAL or not os.path.exists(os.path.join(REAL, "mnist")), reason="no local MNIST"
)


@needs_mnist
def test_mnist_is_mnist():
    d = data.load("mnist", dtype=torch.float32, download=False)
    assert d.x.shape == (60_000, 784) and d.x_test.shape == (10_000, 784)
    assert d.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as everybody's MNIST starts
    assert torch.bincount(d.y_test).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert float(d.x.mean()) == pytest.approx(0.1307, abs=1e-4)  # the published mean and spread
    assert float(d.x.std()) == pytest.approx(0.3081, abs=1e-4)
    assert float(d.x.min()) == 0 and float(d.x.max()) == 1


@pytest.mark.skipif(
    not REAL or not cifar10.is_pack(Path(REAL) / "cifar10"), reason="no JPEG copy of CIFAR-10"
)
def test_cifar10_from_its_jpeg_copy_says_so():
    d = data.load("cifar10", dtype=torch.float32, download=False)
    assert d.source == "JPEG-recompressed CIFAR-10" and d.image_shape == (3, 32, 32)
    assert d.x.shape == (50_000, 3072) and d.x_test.shape == (10_000, 3072)
    assert torch.bincount(d.y).tolist() == [5000] * 10
    assert torch.bincount(d.y_test).tolist() == [1000] * 10
    colours = d.x.view(-1, 3, 1024).mean((0, 2))  # the published means of the original
    assert colours.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=3e-4)


def fake_archive(path, records=2):
    """An archive of the right layout: image k of file i is filled with 10 i + k."""
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate([*cifar10.ARCHIVES[10].train, "test_batch.bin"]):
            content = b"".join(
                bytes([k]) + bytes([10 * i + k]) * 1024 + bytes([1]) * 1024 + bytes([2]) * 1024
                for k in range(records)
            )
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_cifar10_from_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_LITE_DATA", str(tmp_path))
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    fake_archive(path)
    with pytest.raises(data.DataError, match="damaged or not the known file: it has sha256"):
        data.load("cifar10", download=False)  # its hash is not the original's
    own = cifar10.ARCHIVES[10]._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(cifar10.ARCHIVES, 10, own)
    d = data.load("cifar10", download=False)
    assert d.source == "" and d.x.shape == (10, 3072) and d.y.tolist() == [0, 1] * 5
    grey = d.x_test.view(2, 3, 32, 32) * 255  # channels x rows x columns
    assert torch.equal(grey[1], torch.tensor([51.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 32, 32))
    with pytest.raises(data.DataError, match="expected a multiple of 3073; is it truncated"):
        cifar10.read_records(bytes(3072))
    with pytest.raises(data.DataError, match="has a label 17, expected 0 to 9"):
        cifar10.read_records(bytes([17]) + bytes(3072))


def test_standardised_pixels_have_mean_0_and_variance_1_by_colour():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(50, 3, 4, generator=g) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    d = data.Dataset("toy", x.flatten(1), torch.zeros(50), x[:7].flatten(1), None, 2, (3, 2, 2))
    out = data.standardise(d)
    by_colour = out.x.view(50, 3, 4).transpose(0, 1).flatten(1)
    assert float(by_colour.mean(1).abs().max()) < 1e-6
    assert float((by_colour.std(1) - 1).abs().max()) < 1e-6
    assert torch.equal(out.x_test, out.x[:7])  # by the training pixels; number by number
    grey = data.standardise(d._replace(image_shape=(3, 4)))
    assert float(grey.x.mean()) == pytest.approx(0, abs=1e-6)
    assert float(grey.x.std()) == pytest.approx(1)


def test_digits_are_scikit_learns():
    d = data.load("digits")
    assert d.x.dtype == torch.float64 and d.x.shape == (1437, 64)
    assert len(d.x_test) == 360 and float(d.x.max()) == 1
    assert torch.bincount(torch.cat([d.y, d.y_test])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert data.available("digits") == "digits"


def idx(shape, values=None):
    size = 1
    for n in shape:
        size *= n
    header = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return header + (bytes(range(size)) if values is None else values)


def test_idx_is_read_row_major_and_refused_when_damaged():
    array = data.read_idx(idx((2, 3)))
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad, message in (
        (b"PK\x03\x04....", "not an IDX file"),
        (idx((2, 3))[:9], "cut short in its header"),
        (idx((2, 3))[:-1], r"holds 5 values, its header says \(2, 3\); is it truncated"),
        (idx((2, 3)) + b"\0", "holds 7 values"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.read_idx(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx((2, 3)), mtime=0), "is damaged: its content has sha256"),
        (gzip.compress(idx((2, 3)), mtime=0)[:-9], "is damaged: it does not unzip"),
        (b"<html>sign in to continue</html>", "is damaged: it does not unzip"),
    ],
)
@pytest.mark.parametrize("place", ["BILEVEL_LITE_DATA", "BILEVEL_LITE_CACHE"])
def test_a_damaged_file_is_refused(tmp_path, monkeypatch, content, message, place):
    monkeypatch.delenv("BILEVEL_LITE_DATA", raising=False)
    monkeypatch.setenv(place, str(tmp_path))
    (tmp_path / "mnist").mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / "mnist" / f"{name}.gz").write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.load("mnist", download=False)


def test_without_network_one_line_says_what_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("BILEVEL_LITE_DATA", raising=False)
    monkeypatch.setenv("BILEVEL_LITE_CACHE", str(tmp_path))
    import pooch

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    with pytest.raises(data.DataError, match="no local copy of train-images.* could not be read"):
        data.load("mnist")
    assert data.available("mnist") == "digits"
    assert capsys.readouterr().out == (
        "mnist is not at hand here (no local copy of train-images-idx3-ubyte.gz, and no download); "
        "using digits.\n"
    )


def test_a_download_that_is_cut_short_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("BILEVEL_LITE_DATA", raising=False)
    monkeypatch.setenv("BILEVEL_LITE_CACHE", str(tmp_path))
    import pooch

    def cut_short(url, output_file, *args, **kwargs):
        Path(output_file).write_bytes(gzip.compress(idx((2, 3)), mtime=0)[:-9])

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **kwargs: cut_short)
    with pytest.raises(data.DataError, match="sent a file that is damaged or not the original"):
        data.load("mnist")
    assert not list(tmp_path.rglob("*.gz"))  # nothing half-done is left behind


def test_label_noise_redraws_the_rate_and_marks_only_wrong_labels():
    y = torch.arange(10).repeat(10_000)
    noisy, wrong = data.corrupt_labels(y, 0.5, 10, torch.Generator().manual_seed(0))
    assert torch.equal(wrong, noisy != y)
    assert float(wrong.double().mean()) == pytest.approx(0.45, abs=0.005)  # 0.5 * (1 - 1/10)
    shares = torch.bincount(noisy[wrong] * 10 + y[wrong], minlength=100).view(10, 10)
    off_diagonal = shares[~torch.eye(10, dtype=torch.bool)].double()
    assert float(off_diagonal.std() / off_diagonal.mean()) < 0.1  # uniform over wrong classes
    same, _ = data.corrupt_labels(y, 0.5, 10, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, same)
    clean, none = data.corrupt_labels(y, 0.0, 10, torch.Generator())
    assert torch.equal(clean, y) and not none.any()


def test_label_noise_by_a_matrix():
    y, g = torch.arange(3).repeat(20_000), torch.Generator().manual_seed(0)
    noisy, wrong = data.corrupt_labels(y, 0.3, 3, g, data.pair_flips(3))
    assert int(wrong.sum()) == 18_000  # each redrawn label is wrong
    assert torch.equal(noisy[wrong], (y[wrong] + 1) % 3)
    matrix = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.9, 0.0, 0.1]])
    noisy, _ = data.corrupt_labels(y, 1.0, 3, g, matrix)
    counts = torch.bincount(3 * y + noisy, minlength=9).view(3, 3) / 20_000
    assert float((counts - matrix).abs().max()) < 0.015  # four standard errors
    assert torch.equal(counts == 0, matrix == 0)


def test_splits_are_disjoint():
    parts = data.split(100, (60, 30, 5), torch.Generator().manual_seed(0))
    assert [len(p) for p in parts] == [60, 30, 5]
    assert len(set(torch.cat(parts).tolist())) == 95


def batches(seed=0, n=10, size=3):
    x = torch.arange(n, dtype=torch.float64)[:, None]
    return data.Batches(x, torch.arange(n), size, torch.Generator().manual_seed(seed))


def test_a_pass_visits_every_example_at_most_once_and_in_a_new_order():
    b = batches()
    passes = [torch.cat([b.draw()[2] for _ in range(3)]) for _ in range(2)]
    assert all(len(set(p.tolist())) == 9 for p in passes)
    assert not torch.equal(*passes)
    x, y, index = b.draw()
    assert torch.equal(x[:, 0], index.double()) and torch.equal(y, index)
    assert torch.equal(b.all()[2], torch.arange(10))


def test_a_batch_as_large_as_the_set_is_the_set_and_no_copy():
    b = batches(size=10)
    for _ in range(2):
        x, y, index = b.draw()
        assert x is b.x and y is b.y and torch.equal(index, torch.arange(10))
    b.transform = lambda x, generator: x + 1  # what is transformed is drawn anew
    x, y, index = b.draw()
    assert torch.equal(x[:, 0], index.double() + 1)


@pytest.mark.parametrize("drawn", [0, 2, 3, 7])
def test_a_resumed_sampler_draws_the_same_batches(drawn):
    first = batches()
    for _ in range(drawn):
        first.draw()
    second = batches(seed=5)
    second.load_state_dict(first.state_dict())
    for _ in range(8):
        assert torch.equal(first.draw()[2], second.draw()[2])


def draws():
    return torch.Generator().manual_seed(0)


HALF, IMAGES = torch.tensor([0.5, 1.0]), torch.rand(2, 1, 4, 4)
LABELS, FLIPS = torch.tensor([0, 1, 1]), torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: data.load("digits", torch.int64), TypeError, "dtype: got torch.int64, expected a"),
        (lambda: data.load("mnist", torch.bool), TypeError, "dtype: got torch.bool, expected a fl"),
        (lambda: data.load("digits", "float32"), TypeError, "dtype: got 'float32', expected a flo"),
        (lambda: data.load("trec", False), TypeError, "dtype: got False, expected a floating one"),
        (lambda: data.load(["mnist"]), TypeError, r"dataset: got \['mnist'\], expected a name"),
        (lambda: data.load(None), TypeError, "dataset: got None, expected a name, one of"),
        (lambda: data.available("digits", "nope"), ValueError, "fallback: got 'nope', expected on"),
        (lambda: data.available("digits", None), TypeError, "fallback: got None, expected a name"),
        (lambda: data.available("nope"), ValueError, "dataset: got 'nope', expected one of"),
        (lambda: data.split(10, 5, draws()), TypeError, "sizes: got 5, expected whole numbers"),
        (lambda: data.split(10, None, draws()), TypeError, "sizes: got None, expected whole num"),
        (lambda: data.split(10, (2.5,), draws()), TypeError, r"sizes: got \(2.5,\), expected whol"),
        (lambda: data.split(10, (), draws()), ValueError, "sizes: is empty, expected at least one"),
        (lambda: data.split("a", (1,), draws()), ValueError, "n: got 'a', expected an integer of"),
        (lambda: noisy(HALF), TypeError, "labels: got torch.float64, expected a tensor of int"),
        (lambda: noisy(LABELS == 1), TypeError, "labels: got torch.bool, expected a tensor of int"),
        (lambda: noisy([0, 1]), TypeError, "labels: got list, expected a tensor of integers from"),
        (lambda: noisy(rate="0.5"), ValueError, "rate: got '0.5', expected a number from 0 to 1"),
        (lambda: noisy(rate=True), ValueError, "rate: got True, expected a number from 0 to 1"),
        (lambda: noisy(num_classes=None), ValueError, "num_classes: got None, expected an integer"),
        (lambda: noisy(transition=FLIPS.tolist()), TypeError, "transition: got list, expected a f"),
        (lambda: noisy(transition=FLIPS.numpy()), TypeError, "transition: got ndarray, expected"),
        (lambda: noisy(transition=FLIPS), TypeError, "transition: got torch.int64, expected a fl"),
        (lambda: data.pair_flips(None), ValueError, "num_classes: got None, expected an integer"),
        (lambda: data.pair_flips(2.5), ValueError, "num_classes: got 2.5, expected an integer of"),
        (lambda: of_two(torch.tensor([0, 0.5, 1, 1])), TypeError, "labels: got torch.float64, exp"),
        (lambda: of_two(torch.ones(4) > 0), TypeError, "labels: got torch.bool, expected a tensor"),
        (lambda: cropped(None), TypeError, "x: got NoneType, expected a tensor of images"),
        (lambda: cropped(IMAGES.tolist()), TypeError, "x: got list, expected a tensor of images"),
        (lambda: cropped(flip="a"), ValueError, "flip: got 'a', expected a number from 0 to 1"),
        (lambda: cropped(flip=None), ValueError, "flip: got None, expected a number from 0 to 1"),
        (lambda: cropped(padding=True), ValueError, "padding: got True, expected a whole number"),
        (lambda: data.jpeg(IMAGES.numpy(), 9), TypeError, "x: got ndarray, expected a tensor of"),
        (lambda: data.jpeg(IMAGES, True), ValueError, "quality: got True, expected a whole number"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_refused_in_a_sentence(call, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        call()


def noisy(y=LABELS, rate=0.5, num_classes=2, transition=None):
    return data.corrupt_labels(y, rate, num_classes, draws(), transition)


def of_two(y):
    return data.Batches(torch.ones(4, 1), y, 2, draws(), num_classes=2)


def cropped(x=IMAGES, padding=2, flip=0.5):
    return data.crop_and_flip(x, draws(), padding, flip)


def test_numbers_of_numpy_are_numbers():
    whole, half = np.int64(2), np.float32(0.5)
    assert [len(part) for part in data.split(np.int64(9), np.array([4, 2]), draws())] == [4, 2]
    assert torch.equal(noisy(rate=half, num_classes=whole)[0], noisy()[0])
    given = {"padding": whole, "flip": half}
    assert torch.equal(cropped(**given), cropped(padding=2))
    assert torch.equal(data.jpeg(IMAGES, np.int64(90)), data.jpeg(IMAGES, 90))
    assert data.load("digits", torch.float16).x.dtype == torch.float16
    assert of_two(torch.ones(4, dtype=torch.uint8)).y.dtype == torch.uint8


def test_a_matrix_that_is_refused_leaves_the_generator_as_it_was():
    generator = draws()
    with pytest.raises(TypeError):
        data.corrupt_labels(LABELS, 0.5, 2, generator, FLIPS)
    assert torch.equal(generator.get_state(), draws().get_state())
