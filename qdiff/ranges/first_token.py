"""What a layer makes of the first token of its input, where that is the same for all samples: a constant.

Source: MixDQ (Zhao et al., ECCV 2024, arXiv 2405.17873), BOS-aware quantization. What a text encoder that looks back
only, such as CLIP's, gives for the first token does not depend on the text, and may be far larger than the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.functional import at_least_single

# Two tokens are the same if their mean difference is at most this share of their mean magnitude: more than rounding to
# half precision moves a value (0.4 % at most, in bfloat16), less than 8-bit ranges that hold outliers would.
TOLERANCE = 0.01
ANOTHER = (
    "the context begins with another token than in calibration, but --bos_aware made the outputs of its first token "
    "constants; give the text encoder of the calibration, or calibrate without --bos_aware"
)


def is_same_token(found: Tensor, expected: Tensor) -> Tensor:
    """Return which of some tokens [N, C] are an expected one [C], bool [N]; a token with NaN is not."""
    expected = at_least_single(expected.to(found.device))
    return (at_least_single(found) - expected).abs().mean(dim=-1) <= TOLERANCE * expected.abs().mean()


class FirstToken(nn.Module):
    """The output of a linear layer for the first token of its input, in float, computed once.

    Args:
        output: [C_out], what the float layer makes of the token, its bias included.
        input: [C_in], the token, with which the first token of every input is compared; None compares nothing. Of the
            layers that read one context, one has it.

    State: ``output``, and ``input`` if there is one.
    """

    def __init__(self, output: Tensor, input: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("output", output.detach().clone())
        self.register_buffer("input", None if input is None else input.detach().clone())
        self._same: Tensor | None = None  # whether all inputs on a GPU were as expected that nobody has asked for yet

    @classmethod
    def place_for(cls, state: Mapping[str, Tensor], prefix: str, device: torch.device) -> FirstToken | None:
        """Return one without values for what a state dict holds under a prefix; None if it holds none."""
        sizes = {name: state.get(f"{prefix}{name}") for name in ("output", "input")}
        if sizes["output"] is None:
            return None
        return cls(**{n: None if t is None else torch.empty_like(t, device=device) for n, t in sizes.items()})

    def before(self, rest: Tensor, x: Tensor) -> Tensor:
        """Return the outputs of all tokens, [N, L, C_out].

        Args:
            rest: [N, L − 1, C_out], the outputs of the other tokens.
            x: [N, L, C_in], the layer's input.

        Raises:
            UserError: the first token of an input is another one. On a GPU, where that would make the host wait, its
                output is NaN instead, and `check_seen` raises the error.
        """
        first = self.output.to(rest.dtype).expand(len(rest), 1, -1)
        if self.input is not None and not x.is_meta:
            same = is_same_token(x[:, 0], self.input)
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                _check(same)
                return torch.cat([first, rest], dim=1)
            first = first.where(same[:, None, None], torch.nan)
            if not torch.compiler.is_compiling():
                self._same = same.all() if self._same is None else self._same & same.all()
        return torch.cat([first, rest], dim=1)

    def check_seen(self) -> None:
        """Raise the error of `before` for the inputs on a GPU since the last call; waits for the GPU."""
        same, self._same = self._same, None
        if same is not None:
            _check(same)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FirstToken:
        self._same = None
        return super()._apply(fn, recurse)


def _check(same: Tensor) -> None:
    if not same.all():
        raise UserError(ANOTHER)
