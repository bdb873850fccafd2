"""The overlaid digits: what is drawn, where from, and that no image leaks from one split into another."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from gradstats.data import overlaid_digits

load_digits = pytest.importorskip("sklearn.datasets").load_digits
SPLITS = ("train", "valid", "test")


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
