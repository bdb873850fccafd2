"""AutoScale with Lightning's automatic optimization; its state travels in Lightning's checkpoints.

python examples/lightning_module.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradstats


class TwoRegressions(lightning.LightningModule):
    """Two regressions whose units differ by a factor of 1000.

    Args:
        total_steps: Optimizer steps of the whole training.
        accumulate: ``accumulate_grad_batches`` of the Lightning trainer.
    """

    def __init__(self, total_steps: int, accumulate: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(32, 1) for name in ("metres", "millimetres")})
        self.scalarizer = gradstats.Scalarizer(
            "autoscale", tasks=list(self.heads), total_steps=total_steps, accumulate=accumulate
        )

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The weighted sum of the losses; Lightning does the rest."""
        x, *targets = batch
        features = self.encoder(x)
        heads = self.heads.items()
        losses = {name: (head(features) - y).square().mean() for (name, head), y in zip(heads, targets, strict=True)}
        return self.scalarizer(losses)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(epochs: int = 10) -> dict[str, float]:
    """Train; returns the weights found."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    loader = DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2], 1000 * x[:, 2:3].abs()), batch_size=32, shuffle=True)
    module = TwoRegressions(total_steps=epochs * len(loader))
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    return dict(zip(module.heads, module.scalarizer.weights.tolist(), strict=True))


if __name__ == "__main__":
    print("weights:", main())
