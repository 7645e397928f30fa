"""Small networks whose forward is plain Python, as users write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.interface import AttentionCore, State, Step, SteppedNetwork

WIDTH = 4


class Block(nn.Module):
    """A residual block of two layers that adds an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(h) + embedding[:, None]))


class Attention(nn.Module):
    """Self-attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=-1))
        return h + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class SkipNetwork(nn.Module):
    """x [N, L, 4], t [N] → [N, L, 4]: two blocks, attention, and a skip connection past them."""

    attention = Attention

    def __init__(self) -> None:
        super().__init__()
        # Registered in another order than they are called.
        self.last = nn.Linear(2 * WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.middle = self.attention()
        self.embedding = nn.Linear(1, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = F.silu(self.embedding(t[:, None].to(x.dtype) / 1000))
        skip = h = self.head(x)
        h = self.blocks[0](h, embedding)
        h = self.middle(h)
        h = self.blocks[1](h, embedding)
        return self.last(torch.cat([h, skip], dim=-1))


class AttentionOfFamily(Attention):
    """Attention as the families of this package write it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_core_0 = AttentionCore()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention_core_0(q, k, v)


class SteppedSkipNetwork(SkipNetwork, SteppedNetwork):
    """`SkipNetwork` as a sequence of steps, under the same names."""

    attention = AttentionOfFamily
    forward = SteppedNetwork.forward

    def start(self, x: Tensor, t: Tensor) -> State:
        return {"x": x, "t": t[:, None].to(x.dtype) / 1000}

    def steps(self):
        def keeps(name):
            return lambda state, out: state.__setitem__(name, out)

        def embedding(state):
            return F.silu(state["embedding"])

        yield Step("embedding", self.embedding, lambda s: (s["t"],), keeps("embedding"))
        yield Step("head", self.head, lambda s: (s["x"],), lambda s, out: s.update(h=out, skip=out))
        yield Step("blocks.0", self.blocks[0], lambda s: (s["h"], embedding(s)), keeps("h"))
        yield Step("middle", self.middle, lambda s: (s["h"],), keeps("h"))
        yield Step("blocks.1", self.blocks[1], lambda s: (s["h"], embedding(s)), keeps("h"))
        yield Step("last", self.last, lambda s: (torch.cat([s["h"], s["skip"]], dim=-1),), keeps("h"))


class Repeating(nn.Module):
    """Calls a part of its block twice more, with other inputs."""

    def __init__(self):
        super().__init__()
        self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, _):
        h = self.blocks[1](self.blocks[0](x, x[:, 0]), x[:, 0])
        return self.last(h + self.blocks[0].first(x)) + self.blocks[0].first(h)


UNITS = ["embedding", "head", "blocks.0", "middle", "blocks.1", "last"]


def inputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return x and t for `SkipNetwork`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, WIDTH, generator=generator, dtype=torch.float64), torch.arange(count) * 77 + 5


def made(kind: type[nn.Module], *arguments) -> nn.Module:
    """Return a network in float64 and eval mode, always with the same weights."""
    torch.manual_seed(0)
    return kind(*arguments).double().eval()


def leaves_of(network: nn.Module) -> set[nn.Module]:
    """Return the network's layers with products."""
    return {m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d | AttentionCore)}
