"""AutoScale under DistributedDataParallel: every process has its own data, and all hold the same weights.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


def main(steps: int = 100) -> dict[str, float]:
    """Train in the process group that there is; returns the weights found."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scalarizer = gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=steps)

    torch.manual_seed(1 + dist.get_rank())  # from here on the processes differ
    for _ in range(steps):
        x = torch.randn(64, 4)
        targets = {"metres": x[:, :1] * x[:, 1:2], "millimetres": 1000 * x[:, 2:3].abs()}
        predictions = model(x)
        losses = {name: (predictions[name] - targets[name]).square().mean() for name in TASKS}
        scalarizer(losses).backward()  # the gradients of all processes decide, averaged as DDP averages them
        optimizer.step()
        optimizer.zero_grad()

    weights = dict(zip(TASKS, scalarizer.weights.tolist(), strict=True))
    print(f"process {dist.get_rank()}: weights {weights}", flush=True)
    return weights


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
