"""What AutoScale is for: real tasks of very different loss scale, against ideal fixed and against uniform weights."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gradstats import Scalarizer

SCALES = {"even": 1.0, "large": 10.0, "prime": 100.0, "loop": 1000.0}
STEPS = 600


@pytest.fixture(scope="module")
def digits():
    images, digit = load_digits(return_X_y=True)
    labels = {
        "even": digit % 2 == 0,
        "large": digit >= 5,
        "prime": np.isin(digit, (2, 3, 5, 7)),
        "loop": np.isin(digit, (0, 6, 8, 9)),
    }
    return torch.tensor(images / 16 - 0.3).float(), {k: torch.tensor(v).float() for k, v in labels.items()}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


def train(digits, scalarizer: Scalarizer, seed: int, make_optimizer=adamw) -> float:
    """Mean test error over the four tasks of a small shared network, in percent."""
    images, labels = digits
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 + seed))
    rows, held_out = order[:1200], order[1200:]
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    heads = nn.ModuleDict({task: nn.Linear(64, 1) for task in SCALES})
    optimizer = make_optimizer([*trunk.parameters(), *heads.parameters()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (64,))]
        features = trunk(images[batch])
        losses = {
            task: SCALES[task] * binary_cross_entropy_with_logits(head(features)[:, 0], labels[task][batch])
            for task, head in heads.items()
        }
        scalarizer(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        features = trunk(images[held_out])
        errors = [((head(features)[:, 0] > 0) != labels[task][held_out].bool()).float() for task, head in heads.items()]
    return 100 * float(torch.stack(errors).mean())


def autoscale(**options) -> Scalarizer:
    return Scalarizer("autoscale", tasks=list(SCALES), total_steps=STEPS, **options)


@pytest.fixture(scope="module")
def outcomes(digits, one_thread):
    """Test errors of five seeds with ideal fixed weights, AutoScale and uniform weights, and AutoScale's weights."""
    ideal = {task: 1 / scale for task, scale in SCALES.items()}
    errors, weights = {"ideal": [], "autoscale": [], "uniform": []}, []
    for seed in range(5):
        errors["ideal"].append(train(digits, Scalarizer("fixed", tasks=list(SCALES), weights=ideal), seed))
        scalarizer = autoscale()
        errors["autoscale"].append(train(digits, scalarizer, seed))
        weights.append(scalarizer.weights)
        errors["uniform"].append(train(digits, Scalarizer("uniform", tasks=list(SCALES)), seed))
    return {method: np.array(values) for method, values in errors.items()}, weights


def test_weights_found_are_inverse_to_the_scale_of_the_losses(outcomes):
    for weights in outcomes[1]:
        shares = (weights * torch.tensor(list(SCALES.values()))).numpy()
        shares /= np.exp(np.log(shares).mean())
        assert np.abs(np.log(shares)).max() < np.log(2.5), shares


def test_the_result_is_that_of_ideal_fixed_weights(outcomes):
    errors = outcomes[0]
    difference = errors["autoscale"] - errors["ideal"]
    half_width = scipy.stats.t.ppf(0.975, 4) * difference.std(ddof=1) / np.sqrt(5)
    assert difference.mean() <= half_width, errors
    # And that is worth having: without weights the result is several times worse.
    assert errors["autoscale"].mean() < errors["uniform"].mean() / 2, errors


def test_sgd_keeps_the_learning_rate_that_suits_uniform_weights(digits, one_thread):
    """SGD has no second moments to make up for the scale of the objective, so that is what should not change."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=3e-4, momentum=0.9)

    for seed in range(2):
        uniform = train(digits, Scalarizer("uniform", tasks=list(SCALES)), seed, sgd)
        assert train(digits, autoscale(normalize="loss"), seed, sgd) < uniform / 2


@pytest.mark.parametrize("cost", ["condition", "loss"])
def test_the_other_costs_find_the_scale_too(digits, one_thread, cost):
    scalarizer = autoscale(cost=cost)
    train(digits, scalarizer, seed=0)
    shares = scalarizer.weights * torch.tensor(list(SCALES.values()))
    assert float(shares.max() / shares.min()) < 10
