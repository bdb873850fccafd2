"""Four domains, one task: handwritten digits as they are, noisy, inverted and turned, in very different numbers.

Each image belongs to one domain, whose mean loss is a task. The losses' weights come from AutoScale: with ``owner`` one
ordinary backward holds all domains' gradients. They are used as loss weights or, once found, as proportions in which
the loader draws the domains, which gives the same expected gradient.

python examples/domains.py
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradstats
from gradstats.data import DomainSampler, Samples
from gradstats.report import interval, table

DOMAINS = {"clean": 0.6, "noisy": 0.25, "inverted": 0.1, "turned": 0.05}  # shares of the training images
NAMES = tuple(DOMAINS)


def corrupted(images: Tensor, domain: Tensor, generator: torch.Generator) -> Tensor:
    """The images ``[N, 8, 8]``, intensities 0 to 1, as their domain shows them."""
    noisy = images + 0.5 * torch.randn(images.shape, generator=generator)
    shown = torch.stack([images, noisy, 1 - images, images.rot90(1, (1, 2))])
    return shown[domain, torch.arange(len(images))]


def make_data() -> tuple[Samples, Samples]:
    """Training images, each in one domain, and test images, each in all of them."""
    generator = torch.Generator().manual_seed(0)
    source = load_digits()
    images, labels = torch.from_numpy(source.images).float() / 16, torch.from_numpy(source.target)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:1200], order[1200:].repeat(len(NAMES))
    shares = torch.tensor(list(DOMAINS.values()))
    domain = {
        "train": torch.multinomial(shares, len(train), replacement=True, generator=generator),
        "test": torch.arange(len(NAMES)).repeat_interleave(len(test) // len(NAMES)),
    }
    data = {
        name: Samples(
            {"image": corrupted(images[rows], domain[name], generator), "label": labels[rows], "domain": domain[name]}
        )
        for name, rows in (("train", train), ("test", test))
    }
    return data["train"], data["test"]


def train(method: str, steps: int, seed: int) -> dict[str, float]:
    """Train one network; returns its test accuracy in percent in each domain."""
    torch.manual_seed(seed)
    data, test = make_data()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    weighting = {"total_steps": steps} if method != "uniform" else {}
    scalarizer = gradstats.Scalarizer("autoscale" if weighting else "uniform", tasks=NAMES, **weighting)
    sampler = DomainSampler(data.tensors["domain"], batch_size=64, num_batches=steps)
    for batch in DataLoader(data, batch_size=None, sampler=sampler):
        sample_losses = F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
        if method == "sampling" and not scalarizer.weighting.needs:  # the weights are found
            sampler.weights = scalarizer.weights
            loss = scalarizer.weights.sum() * sample_losses.mean()
        else:
            owned = [sample_losses[batch["domain"] == t] for t in range(len(NAMES))]
            losses = {name: own.mean() for name, own in zip(NAMES, owned, strict=True) if len(own)}
            loss = scalarizer(losses, owner=batch["domain"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right = model(test.tensors["image"]).argmax(1) == test.tensors["label"]
    return {name: 100.0 * right[test.tensors["domain"] == t].double().mean().item() for t, name in enumerate(NAMES)}


def main(steps: int = 600, seeds: int = 3) -> dict[str, list[dict[str, float]]]:
    """Train by all methods with all seeds; returns the accuracies."""
    results = {
        method: [train(method, steps, seed) for seed in range(seeds)]
        for method in ("uniform", "loss weights", "sampling")
    }
    rows = []
    for method, runs in results.items():
        values = [[run[name] for run in runs] for name in NAMES]
        values.append([float(np.mean(list(run.values()))) for run in runs])
        rows.append([method, *(f"{interval(column):.1f}" for column in values)])
    print(table(["test accuracy (%)", *NAMES, "mean"], rows))
    return results


if __name__ == "__main__":
    main()
