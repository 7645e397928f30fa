"""The timesteps of calibration samples, for ranges per timestep: which entry of the tables every sample belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.calibration.feeding import to_device
from qdiff.config import ActRanges, QuantConfig
from qdiff.errors import UserError
from qdiff.modes import leaves
from qdiff.quant_model import QuantModel
from qdiff.quantizer import TimestepActQuantizer
from qdiff.ranges.calibrated_timesteps import CalibratedTimesteps
from qdiff.tracing.rows import rows_of_pair


@dataclass(frozen=True)
class SampleTimesteps:
    """The entries of samples, and the timesteps that the network's quantizers share.

    Attributes:
        shared: what tells the quantizers the entries of a batch.
        entries: [N] int64, where the samples are stored.
    """

    shared: CalibratedTimesteps
    entries: Tensor

    def select(self, rows: slice | Tensor, count: int) -> None:
        """Have the quantizers take the ranges of a batch.

        Args:
            rows: the batch, among ``count`` rows.
            count: k·N, where every sample has k rows that follow one another.
        """
        self.take(self.of_rows(count)[rows])

    def take(self, entries: Tensor) -> None:
        """Have the quantizers take the ranges of a batch whose entries are given."""
        self.shared.rows = entries.to(self.shared.values.device)

    def of_rows(self, count: int) -> Tensor:
        """Return the entries of k·N rows; see `select`."""
        each = count // len(self.entries)
        return self.entries if each == 1 else self.entries.repeat_interleave(each)

    def groups(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield every entry with those of the given samples that belong to it, in their order.

        Raises:
            UserError: no sample is at one of the calibrated timesteps.
        """
        entries = self.entries[rows].cpu()  # read once: a mask on a GPU would make the host wait for every entry
        for entry in range(len(self.shared.values)):
            some = rows[to_device((entries == entry).nonzero()[:, 0], rows.device)]
            if len(some) == 0:
                raise UserError(
                    f"no calibration sample is at timestep {float(self.shared.values[entry]):g}; take ranges from more "
                    "samples"
                )
            yield entry, some


def prepare_timesteps(
    qnn: QuantModel, inputs: tuple[Tensor, ...], device: torch.device | None
) -> SampleTimesteps | None:
    """Give a network's quantizers a table with an entry for every timestep of a calibration set.

    Tables of the same timesteps keep their values.

    Args:
        inputs: the calibration set, t [N] the second.
        device: of the stored samples.

    Returns:
        The entries of the samples; None for a network without ranges per timestep.

    Raises:
        UserError: a layer takes rows that cannot be assigned to the samples of a batch.
    """
    shared = qnn.act_timesteps
    if shared is None:
        return None
    t = inputs[1].float()
    values = t.unique(sorted=True).to(shared.values.device)
    if not torch.equal(values, shared.values):
        if len(values) > 1:
            _check_rows(qnn, inputs)
        shared.set(values)
        for quantizer in qnn.act_quantizers().values():
            if isinstance(quantizer, TimestepActQuantizer):
                quantizer.resize(len(values))
    return SampleTimesteps(shared, torch.searchsorted(values.cpu(), t.cpu()).to(device))


def check_timesteps(config: QuantConfig, recorded: Tensor, visited: Iterable[float]) -> None:
    """Raise a `UserError`, before calibration, if ranges per timestep would not cover the timesteps of sampling.

    Args:
        config: nothing is checked if it has no such ranges.
        recorded: t [N] of the calibration set.
        visited: the timesteps of sampling.
    """
    if config.act_ranges is ActRanges.TIMESTEP:
        calibrated = CalibratedTimesteps()
        calibrated.set(recorded.unique())
        calibrated.check(visited)


@torch.no_grad()
def _check_rows(qnn: QuantModel, inputs: tuple[Tensor, ...]) -> None:
    """Raise a `UserError` that names the first layer whose rows are not k per sample, one sample after another."""
    names = {leaf: name for name, leaf in qnn.model.named_modules() if leaf in set(leaves(qnn.model))}

    def taken(rows: list[int]) -> dict[str, list[Tensor]]:
        seen: dict[str, list[Tensor]] = defaultdict(list)
        handles = [
            leaf.register_forward_pre_hook(lambda leaf, args: seen[names[leaf]].extend(a.clone() for a in args))
            for leaf in names
        ]
        try:
            qnn(*(i[rows].to(qnn.device) for i in inputs))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    one, two = taken([0]), taken([0, -1])
    for name, tensors in one.items():
        try:
            found = [rows_of_pair(a, b) for a, b in zip(tensors, two[name], strict=True)]
        except ValueError as error:
            raise UserError(f"an input of {name} {error}; leave out --act_ranges") from None
        if any(rows is not None and not rows.samples_first for rows in found):
            raise UserError(
                f"the rows of a sample do not follow one another in what {name} takes, so that they cannot have ranges "
                "of their timestep; leave out --act_ranges"
            )
