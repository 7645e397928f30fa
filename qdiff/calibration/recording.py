"""Record the denoising network's inputs, or the outputs of a module in it, while a sampler runs the float model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qdiff.sampling.interface import OnCall

Sample = Callable[[OnCall, Sequence[int]], object]
"""``sample(on_call, indices)`` runs the whole sampler for the images numbered ``indices``."""


def record_calls(
    sample: Sample,
    count: int,
    batch_size: int,
    keep: Sequence[int],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Run a sampler batch by batch and keep the network inputs of chosen calls.

    Args:
        sample: see `Sample`.
        count: how many images to sample.
        batch_size: images per batch.
        keep: which calls of a run to keep, counted from 0 (the noisiest).
        on_batch: called with the number of images of each finished batch.

    Returns:
        ``xs`` float32 [len(keep), count, C, H, W], ``ts`` [len(keep), count] and, for conditional models, ``cs`` and
        ``ucs`` [len(keep), count, L, D], on the CPU.

    Raises:
        ValueError: the sampler does not make one of the chosen calls.
    """

    def rows(call: int, indices: Sequence[int]) -> slice | None:
        return slice(None) if call in keep else None

    recorded = _record(sample, count, batch_size, keep, rows, on_batch)
    return {key: torch.stack(calls) for key, calls in recorded.items()}


def record_assigned(
    sample: Sample,
    assignment: Tensor,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, list[Tensor]]:
    """Run a sampler batch by batch and keep ONE network input per image.

    Args:
        sample: see `Sample`.
        assignment: int64 [N]: for image i, the network's input at call ``assignment[i]`` is kept, counted from 0 (the
            noisiest); see `assign`.
        batch_size: images per batch; it does not affect what is recorded.
        on_batch: called with the number of images of each finished batch.

    Returns:
        The published format with steps of different sizes, on the CPU: ``xs`` is a list of float32 [n_i, C, H, W], one
        per call that has images, in sampling order; ``ts`` likewise [n_i] and, for conditional models, ``cs`` and
        ``ucs`` [n_i, L, D]. Images of a call are ordered by number.

    Raises:
        ValueError: the sampler does not make one of the chosen calls.
    """

    def rows(call: int, indices: Sequence[int]) -> Tensor | None:
        mine = (assignment[indices[0] : indices[-1] + 1] == call).nonzero().flatten()
        return mine if len(mine) else None

    return _record(sample, len(assignment), batch_size, assignment.unique().tolist(), rows, on_batch)


def assign(counts: Tensor, generator: torch.Generator) -> Tensor:
    """Return a call for each of Σ counts images, int64 [N]: ``counts[i]`` images, chosen at random, get call i."""
    calls = torch.arange(len(counts)).repeat_interleave(counts)
    return calls[torch.randperm(len(calls), generator=generator)]


def _record(
    sample: Sample,
    count: int,
    batch_size: int,
    calls: Sequence[int],
    wanted: Callable[[int, Sequence[int]], slice | Tensor | None],
    on_batch: Callable[[int], None] | None,
) -> dict[str, list[Tensor]]:
    """Run a sampler batch by batch and return the wanted network inputs by kind, one tensor [n, …] per call.

    Args:
        wanted: ``wanted(call, indices)`` returns the rows to keep at a call from the batch of the images ``indices``.
    """
    kept: dict[str, dict[int, list[Tensor]]] = {}
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        call = 0

        def on_call(
            x: Tensor,
            t: Tensor,
            condition: Tensor | None = None,
            unconditional: Tensor | None = None,
            indices: Sequence[int] = indices,
        ) -> None:
            nonlocal call
            if (rows := wanted(call, indices)) is not None:
                given = {"xs": x.float(), "ts": t, "cs": condition, "ucs": unconditional}
                for key, value in given.items():
                    if value is not None:
                        # Cloned, because samplers reuse their memory.
                        part = value.detach()[rows].cpu().clone()
                        kept.setdefault(key, {}).setdefault(call, []).append(part)
            call += 1

        sample(on_call, indices)
        if on_batch is not None:
            on_batch(len(indices))
    if missing := set(calls) - set(kept.get("xs", ())):
        raise ValueError(f"call {min(missing)} is to be recorded, but the sampler does not make it")
    return {key: [torch.cat(parts[call]) for call in calls] for key, parts in kept.items()}


@torch.no_grad()
def record_features(sample: Sample, network: nn.Module, module_name: str, indices: Sequence[int]) -> list[Tensor]:
    """Run the sampler once and keep the output of one module of the network at every network call.

    For EDA-DM's TDAC this module is `Family.middle`, whose output is the input of the middle attention block.

    Args:
        sample: see `Sample`; it must call ``network``.
        network: the float network.
        module_name: dotted path of the module in it.
        indices: numbers of the images to sample, as one batch.

    Returns:
        T tensors float32 [N, C, H, W], or [N, C, tokens] of a transformer, on the CPU, in sampling order (a list,
        because stacking would need twice the memory). With guidance, N is twice the number of images: the network gets
        the unconditional half first.

    Raises:
        ValueError: the network has no such module, or it did not run.
    """
    if module_name not in dict(network.named_modules()):
        raise ValueError(f"{type(network).__name__} has no module {module_name!r}")
    with _outputs(network.get_submodule(module_name)) as features:
        sample(lambda *_: None, indices)
    if not features:
        raise ValueError(f"{module_name} of {type(network).__name__} did not run while sampling")
    return features


@contextlib.contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield the list to which every output of the module is appended inside the block, float32 on the CPU."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        features = out if isinstance(out, Tensor) else out[-1]  # joint blocks return the text's tokens first
        if features.dim() == 3:  # tokens hold their channels last
            features = features.movedim(-1, 1)
        seen.append(features.detach().to("cpu", torch.float32, copy=True))

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
