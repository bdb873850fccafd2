"""Data sets, and loaders of batches that mix domains."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from gradstats.data import DomainSampler, Samples, batches, nyuv2, overlaid_digits, tox21

load_digits = pytest.importorskip("sklearn.datasets").load_digits
SPLITS = ("train", "valid", "test")


# ---- overlaid digits: what is drawn, where from, and that no image leaks from one split into another -----------------


@pytest.fixture(scope="module")
def splits():
    return overlaid_digits(pairs_per_image=2)


def test_shapes_types_and_sizes(splits):
    assert tuple(splits) == SPLITS
    assert [len(splits[name]) for name in SPLITS] == [2 * 1078, 2 * 360, 2 * 359]
    for data in splits.values():
        assert data.images.shape == (len(data), 1, 11, 11)
        assert data.images.dtype == torch.float32
        assert data.left.dtype == data.right.dtype == data.sources.dtype == torch.int64
        assert data.images.min() == 0
        assert data.images.max() == 16


def test_images_and_labels_are_those_of_the_sources(splits):
    source = load_digits()
    for data in splits.values():
        left, right = data.sources.T.numpy()
        assert np.array_equal(data.left.numpy(), source.target[left])
        assert np.array_equal(data.right.numpy(), source.target[right])
        for n in range(0, len(data), 37):
            expected = np.zeros((2, 11, 11))
            expected[0, :8, :8] = source.images[left[n]]
            expected[1, 3:, 3:] = source.images[right[n]]
            assert np.array_equal(data.images[n, 0].numpy(), expected.max(0))


def test_splits_share_no_source_image_and_use_all(splits):
    used = {name: set(data.sources.flatten().tolist()) for name, data in splits.items()}
    for a, b in combinations(SPLITS, 2):
        assert not used[a] & used[b]
    assert set.union(*used.values()) == set(range(1797))


def test_every_image_is_left_equally_often_with_varying_partners(splits):
    left, right = splits["train"].sources.T
    assert torch.equal(left.unique(return_counts=True)[1], torch.full((1078,), 2))
    assert right.unique().numel() > 800  # 2156 uniform draws of 1078 miss exp(-2) = 14 % of them


def test_the_seed_decides(splits):
    again, other = overlaid_digits(pairs_per_image=2), overlaid_digits(pairs_per_image=2, seed=1)
    for name in SPLITS:
        assert torch.equal(splits[name].images, again[name].images)
        assert torch.equal(splits[name].sources, again[name].sources)
        assert not torch.equal(splits[name].sources, other[name].sources)


def test_indexing_by_number_slice_and_list(splits):
    data = splits["test"]
    assert data[3]["image"].shape == (1, 11, 11)
    assert torch.equal(data[:5]["left"], data.left[:5])
    assert torch.equal(data[[4, 2]]["right"], data.right[[4, 2]])


def test_loader_of_whole_batches(splits):
    data = splits["test"]
    loader = DataLoader(data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), 100, drop_last=False))
    batches = list(loader)
    assert len(batches) == len(loader) == 8
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), data.images)


@pytest.mark.parametrize("pairs", [0, -1])
def test_refuses_no_pairs(pairs):
    with pytest.raises(ValueError, match=f"pairs_per_image: expected at least 1, got {pairs}"):
        overlaid_digits(pairs_per_image=pairs)


def test_names_the_extra_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"gradstats\[demo\]"):
        overlaid_digits()


# ---- data from files ------------------------------------------------------------------------------------------------


def test_tox21_splits_and_unpacks(tmp_path):
    rng = np.random.default_rng(0)
    bits, labels = rng.integers(0, 2, (9, 2048), dtype=np.uint8), rng.random((9, 2)).astype(np.float32)
    labels[0, 1] = np.nan
    code = np.array([0, 1, 2] * 3, np.uint8)
    np.savez(
        tmp_path / "tox21.npz",
        fp2048=np.packbits(bits, axis=1),
        y=labels,
        tasks=np.array(["NR-A", "SR-B"]),
        split_random=code,
        split_scaffold=np.sort(code),
    )
    for split, codes in (("random", code), ("scaffold", np.sort(code))):
        for number, (name, data) in enumerate(tox21(tmp_path, split=split).items()):
            assert name == SPLITS[number]
            assert list(data.tensors) == ["fingerprint", "NR-A", "SR-B"]
            assert np.array_equal(data.tensors["fingerprint"], bits[codes == number])
            assert np.array_equal(data.tensors["SR-B"], labels[codes == number, 1], equal_nan=True)
    with pytest.raises(ValueError, match="split: expected 'random' or 'scaffold', got 'time'"):
        tox21(tmp_path, split="time")


def test_nyuv2_splits_and_converts(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "nyuv2").mkdir()
    arrays = {}
    for name, count in (("train", 30), ("test", 4)):
        arrays[name] = {
            "image": rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8),
            "label13": rng.integers(0, 13, (count, 4, 6), dtype=np.uint8),
            "depth_code": rng.integers(18, 255, (count, 4, 6), dtype=np.uint8),
        }
        np.savez(tmp_path / "nyuv2" / f"{name}.npz", **arrays[name])
    data = nyuv2(tmp_path)
    assert [len(data[name]) for name in SPLITS] == [27, 3, 4]
    sample = data["test"][1]
    assert np.array_equal(sample["image"], arrays["test"]["image"][1].transpose(2, 0, 1))
    assert np.array_equal(sample["segmentation"], arrays["test"]["label13"][1])
    assert np.allclose(sample["depth"], arrays["test"]["depth_code"][1] / 25.5)
    together = torch.cat([data[name].tensors["image"] for name in ("train", "valid")]).permute(0, 2, 3, 1)
    assert {image.numpy().tobytes() for image in together.contiguous()} == {
        image.tobytes() for image in arrays["train"]["image"]
    }


def test_missing_files_and_arrays_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nyuv2/train.npz with the arrays image, label13, depth_code"):
        nyuv2(tmp_path)
    np.savez(tmp_path / "tox21.npz", fp2048=np.zeros((1, 256), np.uint8), tasks=np.array(["a"]))
    with pytest.raises(ValueError, match=r"expected y, split_random in .*tox21.npz, which has fp2048, tasks"):
        tox21(tmp_path)


# ---- loaders --------------------------------------------------------------------------------------------------------


def test_batches_in_order_and_shuffled():
    data = Samples({"x": torch.arange(10), "y": -torch.arange(10)})
    assert [batch["x"].tolist() for batch in batches(data, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    generator = torch.Generator().manual_seed(0)
    epochs = [[batch["x"].tolist() for batch in batches(data, 4, shuffle=True, generator=generator)] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4]
    assert epochs[0] != epochs[1]


def test_domains_come_in_the_proportions_asked_for():
    domain = torch.tensor([2, 0, 1, 0, 0, 2, 0, 0])
    generator = torch.Generator().manual_seed(0)
    sampler = DomainSampler(domain, 50, weights=[0.0, 3.0, 1.0], num_batches=200, generator=generator)
    assert sampler.weights.tolist() == [0.0, 0.75, 0.25]
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 200
    assert {len(rows) for rows in drawn} == {50}
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8) / 10_000
    assert counts[[1, 3, 4, 6, 7]].sum() == 0
    assert counts[2] == pytest.approx(0.75, abs=0.02)  # over four standard errors
    assert counts[0] == pytest.approx(0.125, abs=0.015)
    assert counts[5] == pytest.approx(0.125, abs=0.015)
    sampler.weights = torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64)
    assert {row for rows in sampler for row in rows} == {1, 3, 4, 6, 7}


def test_sampled_domains_give_the_gradient_of_the_weighted_losses():
    value = torch.tensor([1.0, 2.0, 10.0, 30.0], dtype=torch.float64)  # the gradient of each sample
    domain = torch.tensor([0, 0, 0, 1])
    weights = torch.tensor([0.5, 1.5])
    sampler = DomainSampler(domain, 100, weights=weights, num_batches=400, generator=torch.Generator().manual_seed(1))
    mean = torch.stack([value[rows].mean() for rows in sampler]).mean()
    assert float(mean) == pytest.approx((0.5 * 13 / 3 + 1.5 * 30) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": torch.tensor([0.0, 1.0])}, "domain: expected int64 numbers"),
        ({"domain": torch.tensor([0, 2])}, r"of every domain up to 2, got none of \[1\]"),
        ({"batch_size": 0}, "batch_size: expected a positive integer, got 0"),
        ({"weights": [1.0]}, "weights: expected 2 finite, non-negative numbers"),
        ({"weights": [0.0, 0.0]}, "weights: expected 2 finite, non-negative numbers, not all 0"),
        ({"weights": [1.0, float("nan")]}, "weights: expected 2 finite"),
        ({"weights": [2.0, -1.0]}, "weights: expected 2 finite"),
    ],
)
def test_domain_sampler_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        DomainSampler(**{"domain": torch.tensor([0, 1]), "batch_size": 4} | arguments)
