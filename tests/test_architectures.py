"""Unmodified models of many kinds, in float32: every exact method agrees with T plain backwards over the same graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import METHODS, Heads, assert_gram, check, plain_gram
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradstats

pytestmark = [
    pytest.mark.usefixtures("one_thread", "any_size"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

# ---- plain stacks ----------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    trunk = nn.Sequential(
        nn.Linear(5, 12),
        nn.LayerNorm(12),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Linear(12, 12, bias=False),
        nn.BatchNorm1d(12),
        nn.PReLU(12),
        nn.Linear(12, 6),
        nn.RMSNorm(6),
        nn.SiLU(inplace=True),
    )
    return Heads(trunk, 6, torch.randn(8, 5))


def cnn(layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    trunk = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.Hardswish(),
        nn.Dropout2d(0.3),
        nn.Conv2d(8, 12, 1),
        nn.GroupNorm(3, 12),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 8, 3, dilation=2, padding=2, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Heads(trunk, 8, torch.randn(6, 3, 8, 8).to(memory_format=layout)).to(memory_format=layout)


class Convolutions(Heads):
    """In one and three dimensions, transposed ones too, over the same numbers."""

    def __init__(self) -> None:
        trunk = nn.Sequential(
            nn.Conv1d(4, 6, 3, stride=2),
            nn.LocalResponseNorm(2),
            nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1),
            nn.Unflatten(2, (2, 2, 4)),
            nn.Conv3d(4, 5, 2, padding=1),
            nn.LeakyReLU(),  # before the normalization, which leaves no gradient but rounding to a bias just below it
            nn.BatchNorm3d(5),
            nn.AvgPool3d(2),
            nn.Flatten(),
        )
        super().__init__(trunk, 10, torch.randn(4, 4, 16))


class UNet(Heads):
    """Skips across levels; each head reads another resolution."""

    def __init__(self) -> None:
        down = [nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, stride=2)]
        up = [nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(8, 4, 3, padding=1)]
        super().__init__(nn.ModuleList([*down, *up]), 4, torch.randn(2, 2, 8, 8))
        self.coarse = nn.Conv2d(6, 1, 1)

    def forward(self) -> dict[str, Tensor]:
        first, second, up, last = self.trunk
        high = functional.relu(first(self.x))
        low = functional.relu(second(high))
        joined = torch.cat([functional.pixel_shuffle(up(low).repeat(1, 4, 1, 1), 2)[..., ::2, ::2], high], 1)
        out = functional.interpolate(last(joined), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
        return {
            "fine": (self.heads[0](out) ** 2).mean(),
            "middle": (self.heads[1](high.movedim(1, -1)) ** 2).mean(),
            "coarse": functional.huber_loss(self.coarse(low), torch.zeros(2, 1, 4, 4)),
        }


class DenseNet(Heads):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(4 * (i + 1), 4) for i in range(4)), 20, torch.randn(6, 4))

    def features(self) -> Tensor:
        states = [self.x]
        for layer in self.trunk:
            states.append(torch.tanh(layer(torch.cat(states, -1))))
        return torch.cat(states, -1)


# ---- recurrent -------------------------------------------------------------------------------------------------------


class PackedLSTM(Heads):
    """Sequences of different length; the heads read outputs, hidden and cell states."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(4, 6, num_layers=2, batch_first=True, dropout=0.2), 6, torch.randn(3, 5, 4))

    def forward(self) -> dict[str, Tensor]:
        packed = pack_padded_sequence(self.x, torch.tensor([5, 2, 4]), batch_first=True, enforce_sorted=False)
        out, (hidden, cell) = self.trunk(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        return {
            f"t{i}": (head(states) ** 2).mean()
            for i, (head, states) in enumerate(zip(self.heads, (padded, hidden, cell), strict=True))
        }


class Recurrences(Heads):
    """RNN with ReLU in both directions, GRU, and an LSTM with projections, one after the other."""

    def __init__(self) -> None:
        layers = [
            nn.RNN(4, 3, nonlinearity="relu", bidirectional=True),
            nn.GRU(6, 5),
            nn.LSTM(5, 6, proj_size=4),
        ]
        super().__init__(nn.ModuleList(layers), 4, torch.randn(5, 3, 4))

    def features(self) -> Tensor:
        h = self.x
        for layer in self.trunk:
            h, _ = layer(h)
        return h


class Cells(Heads):
    """Cells called in a loop, which ends when the data says so; heads leave it at different times."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.LSTMCell(4, 5), nn.GRUCell(5, 5)]), 5, torch.randn(6, 3, 4))

    def forward(self) -> dict[str, Tensor]:
        lstm, gru = self.trunk
        h, c, g = (torch.zeros(3, 5) for _ in range(3))
        losses: dict[str, Tensor] = {}
        for step, x in enumerate(self.x):
            h, c = lstm(x, (h, c))
            g = gru(h, g) if float(h.detach().sum()) < 5 else g
            if step % 2:
                task = step // 2
                losses[f"t{task}"] = (self.heads[task](g + h) ** 2).mean()
        return losses


# ---- attention -------------------------------------------------------------------------------------------------------


class EncoderDecoder(Heads):
    """``nn.Transformer`` as it comes, with masks and dropout."""

    def __init__(self) -> None:
        trunk = nn.Transformer(8, 2, 1, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        super().__init__(trunk, 8, torch.randn(2, 6, 8))

    def features(self) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(4)
        padding = torch.zeros(2, 6).index_fill(1, torch.tensor([5]), -torch.inf)
        out: Tensor = self.trunk(
            self.x,
            self.x[:, :4],
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return out


class CrossAttention(Heads):
    """Separate projections, extra keys, and a loss on the attention weights themselves."""

    def __init__(self) -> None:
        trunk = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, add_bias_kv=True, add_zero_attn=True, batch_first=True)
        super().__init__(trunk, 8, torch.randn(2, 4, 8))
        self.keys, self.values = torch.randn(2, 6, 5), torch.randn(2, 6, 3)

    def forward(self) -> dict[str, Tensor]:
        out, attention = self.trunk(self.x, self.keys, self.values, average_attn_weights=False)
        return {**self.over(out), "entropy": -(attention * (attention + 1e-9).log()).sum(-1).mean()}


class FusedAttention(Heads):
    """Queries, keys and values from one product, split, and scaled dot-product attention."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(8, 24), nn.Linear(8, 8)]), 8, torch.randn(2, 5, 8))

    def features(self) -> Tensor:
        project, merge = self.trunk
        q, k, v = project(self.x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.x + merge(out.transpose(1, 2).flatten(2))


# ---- where parameters come from --------------------------------------------------------------------------------------


class Parametrized(Heads):
    def __init__(self) -> None:
        trunk = nn.Sequential(
            parametrizations.weight_norm(nn.Conv1d(2, 3, 3)),
            nn.Flatten(),
            nn.SELU(),
            parametrizations.spectral_norm(nn.Linear(12, 6)),
            nn.Softplus(),
            parametrizations.orthogonal(nn.Linear(6, 6, bias=False), orthogonal_map="cayley"),
        )
        super().__init__(trunk, 6, torch.randn(4, 2, 6))


class TiedLanguageModel(Heads):
    """One matrix embeds and decodes, as three tasks see it: next token, masked token, and a norm of the logits."""

    def __init__(self) -> None:
        embedding = nn.Embedding(11, 6, padding_idx=0)
        super().__init__(nn.ModuleDict({"embedding": embedding, "layer": nn.Linear(6, 6)}), 6, torch.empty(0))
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = embedding.weight
        self.tokens = torch.randint(0, 11, (3, 7))

    def forward(self) -> dict[str, Tensor]:
        hidden = torch.tanh(self.trunk["layer"](self.trunk["embedding"](self.tokens)))
        logits = self.decoder(hidden)
        return {
            "next": functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()),
            "masked": functional.nll_loss(logits[:, 2].log_softmax(-1), self.tokens[:, 2]),
            "norm": logits.logsumexp(-1).square().mean(),
        }


class ParentsUseParameters(Heads):
    """A parent with parameters of its own (token, positions, scale) that also uses its children's in functions."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), 6, torch.randn(4, 5, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.empty(0, 6))

    def features(self) -> Tensor:
        x = torch.cat([self.token.expand(4, 1, 6), self.x], 1) + self.positions
        x = torch.tanh(self.trunk[0](x)) * self.scale
        x = functional.linear(x, self.trunk[1].weight, self.trunk[1].bias)
        x = torch.einsum("bsi,io->bso", x, self.trunk[2].weight) @ self.trunk[1].weight.T + self.trunk[2].bias
        return torch.cat([x, self.empty.expand(4, 0, 6)], 1)[:, 0]


class ParallelSharing(Heads):
    """Two modules that hold the same parameter, side by side, and a third with its bias."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), 6, torch.randn(4, 6))
        self.trunk[1].weight = self.trunk[0].weight
        self.trunk[2].bias = self.trunk[0].bias
        self.other = torch.randn(4, 6)

    def features(self) -> Tensor:
        a, b, c = self.trunk
        return torch.tanh(a(self.x)) * torch.tanh(b(self.other)) + c(self.x * self.other)


class Repeated(Heads):
    """One block used at every depth, as in ALBERT; task i leaves after i + 1 rounds."""

    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True), 8, torch.randn(2, 4, 8))

    def forward(self) -> dict[str, Tensor]:
        h, losses = self.x, {}
        for i, head in enumerate(self.heads):
            h = self.trunk(h)
            losses[f"t{i}"] = (head(h) ** 2).mean()
        return losses


class FlatParameter(nn.Module):
    """All weights are views of one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(5 * 6 + 6 + 6 * 4 + 4) / 2)
        self.x = torch.randn(4, 5)

    def forward(self) -> dict[str, Tensor]:
        w1, b1, w2, b2 = self.flat.split([30, 6, 24, 4])
        out = functional.linear(torch.sin(functional.linear(self.x, w1.view(6, 5), b1)), w2.view(4, 6), b2)
        return {f"t{i}": column.square().mean() for i, column in enumerate(out.unbind(1)[:3])}


class Ensemble(nn.Module):
    """``torch.func`` inside the model: three members evaluated by ``vmap`` over stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        members = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(3)]
        stacked, _ = torch.func.stack_module_state(members)
        self.names = list(stacked)
        self.stacked = nn.ParameterList(stacked.values())
        self.skeleton = [members[0].to("meta")]  # in a list, so that it is no submodule
        self.x = torch.randn(6, 4)

    def forward(self) -> dict[str, Tensor]:
        def member(params: dict[str, Tensor]) -> Tensor:
            out: Tensor = torch.func.functional_call(self.skeleton[0], params, (self.x,))
            return out

        out = torch.vmap(member)(dict(zip(self.names, self.stacked, strict=True)))
        return {"mean": out.mean(0).square().mean(), "spread": out.var(0).mean(), "first": out[0].abs().mean()}


class HyperNetwork(Heads):
    """The weights of a layer are the output of another network."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 42)), 6, torch.randn(5, 6))
        self.code = nn.Parameter(torch.randn(3))
        self.layer = [nn.Linear(6, 6)]

    def features(self) -> Tensor:
        weight, bias = self.trunk(self.code).split([36, 6])
        out: Tensor = torch.func.functional_call(self.layer[0], {"weight": weight.view(6, 6), "bias": bias}, (self.x,))
        return torch.tanh(out)


class LowRank(Heads):
    """A frozen layer with a trained low-rank update, of which one factor starts at zero."""

    def __init__(self) -> None:
        trunk = nn.ModuleDict({"frozen": nn.Linear(6, 6), "down": nn.Linear(6, 2), "up": nn.Linear(2, 6)})
        trunk["frozen"].requires_grad_(False)
        nn.init.zeros_(trunk["up"].weight)
        super().__init__(trunk, 6, torch.randn(5, 6))

    def features(self) -> Tensor:
        return torch.tanh(self.trunk["frozen"](self.x) + self.trunk["up"](self.trunk["down"](self.x)))


# ---- embeddings ------------------------------------------------------------------------------------------------------


class EmbeddingBags(Heads):
    def __init__(self, *, sparse: bool = False) -> None:
        modes = ["sum", "mean"] if sparse else ["sum", "mean", "max"]
        bags = [nn.EmbeddingBag(9, 4, mode=mode, sparse=sparse) for mode in modes]
        super().__init__(nn.ModuleList(bags), 4 * len(bags), torch.randint(0, 9, (10,)))
        self.per_sample = torch.rand(10)

    def features(self) -> Tensor:
        offsets = torch.tensor([0, 3, 3, 7])
        return torch.cat(
            [bag(self.x, offsets, self.per_sample if bag.mode == "sum" else None) for bag in self.trunk], -1
        )


class Embeddings(Heads):
    """The same table read several ways, one of which scales gradients by frequency."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__(nn.Embedding(9, 4, padding_idx=2, sparse=sparse), 4, torch.randint(0, 9, (3, 5)))
        self.sparse = sparse

    def features(self) -> Tensor:
        table = self.trunk.weight
        if self.sparse:
            return self.trunk(self.x) + functional.embedding(self.x.flip(0), table, sparse=True)
        scaled = functional.embedding(self.x, table, scale_grad_by_freq=True)
        return self.trunk(self.x) + scaled + table[self.x.flip(1)] + functional.one_hot(self.x, 9).float() @ table


# ---- control flow that the data decides ------------------------------------------------------------------------------


class MixtureOfExperts(Heads):
    """The best two of five experts for each token; an expert without tokens has no gradient."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(6, 6) for _ in range(5)), 6, torch.randn(4, 6))
        self.router = nn.Linear(6, 5)

    def features(self) -> Tensor:
        scores, chosen = self.router(self.x).softmax(-1).topk(2)
        out = torch.zeros_like(self.x)
        for k, expert in enumerate(self.trunk):
            rows, ranks = (chosen == k).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, scores[rows, ranks, None] * torch.relu(expert(self.x[rows])))
        return out

    def forward(self) -> dict[str, Tensor]:
        return {**super().forward(), "balance": self.router(self.x).softmax(-1).mean(0).square().sum()}


class ControlFlow(Heads):
    """Loops, branches, masks and in-place writes; task 2 takes another branch and task 1 skips a layer."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(5, 5) for _ in range(4)), 5, torch.randn(4, 5))

    def forward(self) -> dict[str, Tensor]:
        h, states = self.x, []
        while float(h.detach().norm()) > 1.5 and len(states) < 5:
            h = torch.tanh(self.trunk[len(states) % 2](h)) * 0.8
            h[h > 0.5] *= 0.9
            states.append(h)
        canvas = torch.zeros(4, 10)
        canvas[:, :5] = self.trunk[2](h)
        canvas[:, 5:].copy_(states[0])
        canvas.mul_(torch.where(canvas > 0, 1.0, 0.3))
        branch = self.trunk[3](h) if bool(h.detach().sum() < 1e9) else h
        reads = [canvas[:, :5], canvas[:, 5:], branch]
        return {f"t{i}": head(x).square().mean() for i, (head, x) in enumerate(zip(self.heads, reads, strict=True))}


class GraphNetwork(Heads):
    """Messages along edges, normalised over each node's neighbours."""

    def __init__(self) -> None:
        layers = {"message": nn.Bilinear(4, 4, 5), "score": nn.Linear(8, 1)}
        super().__init__(nn.ModuleDict(layers), 5, torch.randn(6, 4))
        self.edges = torch.randint(0, 6, (2, 14))

    def features(self) -> Tensor:
        source, target = self.edges
        ends = self.x[source], self.x[target]
        score = self.trunk["score"](torch.cat(ends, -1)).squeeze(-1).exp()
        total = torch.zeros(6).scatter_add(0, target, score)
        messages = self.trunk["message"](*ends) * (score / total[target])[:, None]
        return torch.zeros(6, 5).index_add(0, target, messages)


# ---- unusual losses --------------------------------------------------------------------------------------------------


class PhysicsInformed(nn.Module):
    """Losses made of derivatives of the network, to second order."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.diffusion = nn.Parameter(torch.tensor(0.1))
        self.points = torch.rand(10, 2)

    def forward(self) -> dict[str, Tensor]:
        points = self.points.clone().requires_grad_()
        u = self.net(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), points, create_graph=True)
        return {
            "residual": (du[:, 1] - self.diffusion * ddu[:, 0] + u[:, 0] * du[:, 0]).square().mean(),
            "initial": (self.net(self.points * torch.tensor([1.0, 0.0])) - 1).square().mean(),
            "boundary": self.net(self.points * torch.tensor([0.0, 1.0])).square().mean(),
        }


class Variational(Heads):
    """Random numbers drawn in the forward; reconstruction, divergence and a head that reads the sample."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"encode": nn.Linear(6, 8), "decode": nn.Linear(4, 6)}), 4, torch.rand(5, 6))

    def forward(self) -> dict[str, Tensor]:
        mean, log_variance = self.trunk["encode"](self.x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return {
            "reconstruction": functional.binary_cross_entropy_with_logits(self.trunk["decode"](code), self.x),
            "divergence": 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance).mean(),
            "head": functional.gaussian_nll_loss(self.heads[0](code), torch.ones(5, 2), log_variance[:, :2].exp()),
        }


class ManyLosses(Heads):
    """Contrastive, ranking, alignment (CTC) and distillation losses over one encoder that is called three times."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(4, 6, batch_first=True), 6, torch.randn(3, 7, 4))
        self.logits = nn.Linear(6, 5)

    def forward(self) -> dict[str, Tensor]:
        anchor, positive, negative = (self.trunk(x)[0] for x in (self.x, self.x + 0.1, self.x.flip(0)))
        log_p = self.logits(anchor).log_softmax(-1)
        similarity = functional.normalize(anchor[:, -1]) @ functional.normalize(positive[:, -1]).T
        targets, lengths = torch.randint(1, 5, (3, 3)), (torch.full((3,), 7), torch.full((3,), 3))
        alike = functional.cosine_embedding_loss(anchor[:, 1], negative[:, 1], torch.ones(3))
        return {
            "contrastive": functional.cross_entropy(similarity / 0.5, torch.arange(3)),
            "triplet": functional.triplet_margin_loss(anchor[:, 0], positive[:, 0], negative[:, 0], margin=5.0),
            "ctc": functional.ctc_loss(log_p.transpose(0, 1), targets, *lengths),
            "distillation": functional.kl_div(log_p, torch.full((3, 7, 5), 0.2), reduction="batchmean"),
            "several": alike + 0.1 * log_p.mean(),
        }


class Spectral(Heads):
    """A Fourier layer with complex weights that are stored as pairs of real ones."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), 4, torch.randn(3, 8, 4))
        self.modes = nn.Parameter(torch.randn(5, 4, 4, 2) / 4)

    def features(self) -> Tensor:
        spectrum = torch.fft.rfft(self.trunk(self.x), dim=1)
        mixed = torch.einsum("bkc,kcd->bkd", spectrum, torch.view_as_complex(self.modes))
        return torch.fft.irfft(mixed, n=8, dim=1) + spectrum.abs().mean(1, keepdim=True)


class Sampling(Heads):
    """A spatial transformer: where the image is read is itself predicted."""

    def __init__(self) -> None:
        layers = {"pose": nn.Linear(32, 6), "conv": nn.Conv2d(2, 4, 3, padding=1)}
        super().__init__(nn.ModuleDict(layers), 4, torch.randn(3, 2, 4, 4))

    def features(self) -> Tensor:
        grid = functional.affine_grid(
            self.trunk["pose"](self.x.flatten(1)).view(3, 2, 3), (3, 2, 5, 5), align_corners=False
        )
        sampled = functional.grid_sample(self.x, grid, align_corners=False)
        return functional.unfold(self.trunk["conv"](sampled), 2).unflatten(1, (4, 4)).amax(2).transpose(1, 2)


# ---- transformers ----------------------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LIBRARY: dict[str, dict[str, object]] = {
    "Bert": _SMALL,
    "DebertaV2": {**_SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    "Llama": {**_SMALL, "num_key_value_heads": 1},
    "Mixtral": {**_SMALL, "num_key_value_heads": 1, "num_local_experts": 4},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50},
    "Rwkv": {**_SMALL, "attention_hidden_size": 16},
    "FNet": _SMALL,
    "ViT": {**_SMALL, "image_size": 16, "patch_size": 4},
    "Swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 2,
    },
    "Segformer": {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
    "ConvNext": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2},
    "ResNet": {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "MobileNetV2": {"depth_multiplier": 0.1, "min_depth": 4, "finegrained_output": False},
    "Wav2Vec2": {
        **_SMALL,
        "conv_dim": [8, 8],
        "conv_stride": [5, 2],
        "conv_kernel": [10, 3],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
}


class FromLibrary(nn.Module):
    """A model of ``transformers`` with random weights, in training mode, with three heads."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, f"{name}Config")(**_LIBRARY[name])
        self.trunk = getattr(transformers, f"{name}Model")(config).train()
        batch = {
            "input_ids": torch.randint(3, 50, (2, 8)),
            "pixel_values": torch.randn(2, 3, 16, 16),
            "input_values": torch.randn(2, 400),
        }
        self.batch = {self.trunk.main_input_name: batch[self.trunk.main_input_name]}
        if config.is_encoder_decoder:
            self.batch["decoder_input_ids"] = batch["input_ids"].flip(1)
        self.heads = nn.ModuleList(nn.LazyLinear(2) for _ in range(3))

    def forward(self) -> dict[str, Tensor]:
        features = self.trunk(**self.batch)[0]
        features = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        return {f"t{i}": (head(features) ** 2).mean() for i, head in enumerate(self.heads)}


# ---- the comparison --------------------------------------------------------------------------------------------------

_OWN: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "convolutions_1d_3d": Convolutions,
    "unet": UNet,
    "densenet": DenseNet,
    "packed_lstm": PackedLSTM,
    "rnn_gru_lstm": Recurrences,
    "cells": Cells,
    "transformer_encoder_decoder": EncoderDecoder,
    "cross_attention": CrossAttention,
    "fused_attention": FusedAttention,
    "parametrized": Parametrized,
    "tied_language_model": TiedLanguageModel,
    "parents_use_parameters": ParentsUseParameters,
    "parallel_sharing": ParallelSharing,
    "repeated_block": Repeated,
    "flat_parameter": FlatParameter,
    "vmapped_ensemble": Ensemble,
    "hypernetwork": HyperNetwork,
    "low_rank": LowRank,
    "embedding_bags": EmbeddingBags,
    "embeddings": Embeddings,
    "mixture_of_experts": MixtureOfExperts,
    "control_flow": ControlFlow,
    "graph_network": GraphNetwork,
    "physics_informed": PhysicsInformed,
    "variational": Variational,
    "many_losses": ManyLosses,
    "spectral": Spectral,
    "sampling": Sampling,
}
#: vmap refuses their backward, as method "batched" may say; the others take them.
_UNBATCHED: dict[str, Callable[[], nn.Module]] = {
    "cnn_channels_last": lambda: cnn(torch.channels_last),
    "sparse_embeddings": lambda: Embeddings(sparse=True),
    "sparse_embedding_bags": lambda: EmbeddingBags(sparse=True),
}


@pytest.fixture(scope="module", params=[*_OWN, *_UNBATCHED, *_LIBRARY])
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, dict[str, Tensor]]:
    """A model and the graph of its losses, which all methods differentiate."""
    name = request.param
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - masks of wav2vec 2.0 come from here
    if name in _LIBRARY:
        pytest.importorskip("transformers")
    model = FromLibrary(name) if name in _LIBRARY else {**_OWN, **_UNBATCHED}[name]()
    return name, model, model()


@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_plain_backwards(case: tuple[str, nn.Module, dict[str, Tensor]], method: str) -> None:
    name, model, losses = case
    try:
        stats = check(model, losses, method)
    except RuntimeError as error:
        if method != "batched" or name not in _UNBATCHED or "method: 'batched'" not in str(error):
            raise
        return
    assert stats.present.all()
    assert stats.finite.all()
    assert (stats.gram.diagonal() > 0).all()
    shared = list(gradstats.shared_parameters(losses, model).values())
    assert shared
    stats = gradstats.from_losses(losses, method=method, retain_graph=True)
    assert_gram(stats.gram, plain_gram(losses.values(), shared))


def test_agrees_where_parameters_are_cast(case: tuple[str, nn.Module, dict[str, Tensor]]) -> None:
    """As autocast does it, but so that nothing is rounded: float64 parameters of a float32 model."""
    name, model, _ = case
    if name.startswith("sparse"):
        pytest.skip("autograd does not cast sparse gradients")
    leaves = {key: nn.Parameter(p.double()) for key, p in model.named_parameters()}
    losses = torch.func.functional_call(model, {key: leaf.float() for key, leaf in leaves.items()}, ())
    check(nn.ParameterList(leaves.values()), losses, "auto")
