"""Try a network without weights, on the meta device: sizes that do not fit are found before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qdiff.errors import UserError, first_line


@contextlib.contextmanager
def check_runs(origin: str, what: str) -> Iterator[None]:
    """Turn what torch says about sizes while a network is built and run on meta tensors into one sentence.

    Args:
        origin: what the config is called in the error.
        what: the keys to look at.
    """
    try:
        with torch.no_grad(), NormsKeepShapes():
            yield
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{origin} describes a network that cannot run ({first_line(error)}); correct {what}"
        ) from error


class NormsKeepShapes(TorchFunctionMode):
    """A norm on the meta device returns an empty tensor of its input's shape inside the block.

    PyTorch works out the shapes of norms there in Python, operation by operation, which takes most of the time of a
    network's forward. Sizes that do not fit raise what they raise without this.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FITS and args[0].is_meta and _FITS[func](*args, **kwargs):
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        return func(*args, **kwargs)


def _groups_fit(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0
) -> bool:
    given = [p.shape for p in (weight, bias) if p is not None]
    # More than one value in a group, and all of a channel's own.
    return (
        x.dim() > 2
        and num_groups > 0
        and x.shape[1] % num_groups == 0
        and x.shape[1:].numel() > num_groups
        and all(shape == x.shape[1:2] for shape in given)
    )


def _layers_fit(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> bool:
    own = torch.Size(normalized_shape)
    given = [p.shape for p in (weight, bias) if p is not None]
    return len(own) > 0 and x.shape[-len(own) :] == own and all(shape == own for shape in given)


_FITS = {F.group_norm: _groups_fit, F.layer_norm: _layers_fit}
