"""AutoScale in a plain training loop: two regressions whose units differ by a factor of 1000.

python examples/plain_loop.py
"""

import torch
from torch import Tensor, nn

import gradstats

TASKS = ("metres", "millimetres")


class Model(nn.Module):
    """An encoder that both tasks share, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(32, 1) for name in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Predictions ``[N, 1]`` of each task."""
        features = self.encoder(x)
        return {name: head(features) for name, head in self.heads.items()}


def main(steps: int = 200) -> dict[str, float]:
    """Train; returns the weights found."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    targets = {"metres": x[:, :1] * x[:, 1:2], "millimetres": 1000 * x[:, 2:3].abs()}

    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scalarizer = gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        predictions = model(x[rows])
        losses = {name: (predictions[name] - targets[name][rows]).square().mean() for name in TASKS}
        loss = scalarizer(losses)  # records the Gramian in some of the first steps, and nothing later
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(scalarizer.stats)
    return dict(zip(TASKS, scalarizer.weights.tolist(), strict=True))


if __name__ == "__main__":
    print("weights:", main())
