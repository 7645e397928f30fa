"""The discrete noise schedule (β_t, ᾱ_t) and the timesteps at which a sampler visits it.

Symbols: β_t, α_t = 1 − β_t and ᾱ_t = Π α_s as in DDPM (Ho et al. 2020); the DDIM paper (Song et al. 2021)
writes α_t for this ᾱ_t. Timesteps are 0 … T−1, as in the released code; the papers count 1 … T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qdiff.errors import UserError


class BetaKind(str, Enum):
    """Shapes of β_t over t, under the names of ``diffusion.beta_schedule`` in DDIM's configs."""

    LINEAR = "linear"  # linear in β (DDPM)
    QUAD = "quad"  # linear in √β
    SCALED_LINEAR = "scaled_linear"  # the same, under the diffusers library's name
    CONST = "const"  # always `end`
    JSD = "jsd"  # 1/T, 1/(T−1), …, 1
    SIGMOID = "sigmoid"  # logistic between `start` and `end`
    COSINE = "cosine"  # ᾱ_t falls as a squared cosine; `start` and `end` are not used
    SQRT = "sqrt"  # the square root of linear


COSINE_OFFSET = 8e-3
COSINE_LARGEST = 0.999  # largest β, near T


class SkipKind(str, Enum):
    """How the visited timesteps are spaced (``--skip_type``)."""

    UNIFORM = "uniform"
    QUAD = "quad"


def make_beta_schedule(
    kind: BetaKind | str, start: float, end: float, n: int, cosine_offset: float = COSINE_OFFSET
) -> Tensor:
    """Return β_0 … β_{n−1}, float64 [n], on the CPU.

    Note that "linear" in latent diffusion's configs means linear in √β, which is `BetaKind.SCALED_LINEAR` here.

    Args:
        kind: the shape.
        start, end: the first and last value, unless `BetaKind` says otherwise.
        n: number of training timesteps T.
        cosine_offset: s of the cosine, ᾱ(u) = cos²((u + s)/(1 + s)·π/2) at u = t/T.

    Raises:
        UserError: the kind is unknown, n < 1, or a β is outside (0, 1].

    Source: DDPM (Ho et al. 2020) section 4; the shapes are those of the released DDPM, DDIM and latent diffusion code.
        The cosine is from Nichol & Dhariwal 2021, eq. (17).
    """
    try:
        kind = BetaKind(kind)
    except ValueError:
        names = ", ".join(k.value for k in BetaKind)
        raise UserError(f"beta_schedule is {kind!r}; choose one of {names}") from None
    if n < 1:
        raise UserError(f"num_diffusion_timesteps is {n}; give at least 1")
    if kind is BetaKind.LINEAR:
        betas = np.linspace(start, end, n)
    elif kind in (BetaKind.QUAD, BetaKind.SCALED_LINEAR):
        with np.errstate(invalid="ignore"):  # a negative end becomes NaN, which the check below rejects
            betas = np.linspace(np.sqrt(start), np.sqrt(end), n) ** 2
    elif kind is BetaKind.CONST:
        betas = np.full(n, end, dtype=np.float64)
    elif kind is BetaKind.JSD:
        betas = 1.0 / np.arange(n, 0, -1, dtype=np.float64)
    elif kind is BetaKind.COSINE:
        bars = np.cos((np.arange(n + 1) / n + cosine_offset) / (1.0 + cosine_offset) * (np.pi / 2.0)) ** 2
        betas = np.minimum(1.0 - bars[1:] / bars[:-1], COSINE_LARGEST)
    elif kind is BetaKind.SQRT:
        with np.errstate(invalid="ignore"):
            betas = np.sqrt(np.linspace(start, end, n))
    else:
        betas = start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, n)))
    return _checked(torch.from_numpy(betas))


def _checked(betas: Tensor) -> Tensor:
    if betas.dim() != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas <= 1)).all()):
        raise UserError("the noise schedule needs a list of β_t in (0, 1]; correct beta_start and beta_end")
    return betas


def _to_zero_terminal_snr(betas: Tensor) -> Tensor:
    roots = torch.cumprod(1.0 - betas.double(), dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    if len(roots) == 1 or first <= last:
        raise UserError("a noise schedule of one timestep cannot be rescaled to end without signal; give more")
    bars = ((roots - last) * (first / (first - last))).square()
    return 1.0 - bars / torch.cat([bars.new_ones(1), bars[:-1]])


class Step(NamedTuple):
    """One step of a sampler: from time ``t`` with ᾱ_t to the next (less noisy) time's ᾱ."""

    t: int
    alpha_bar: float
    alpha_bar_next: float


@dataclass(frozen=True, eq=False)
class DiffusionSchedule:
    """The training-time noise schedule.

    It is kept on the CPU, and samplers use its values as Python floats, so the coefficients are the same on every
    device and reading them never waits for a GPU.

    Args:
        betas: β_t [T], any float type, each in (0, 1]. Kept as float32, the precision that the networks were
            trained with.
        zero_terminal_snr: rescale so that no signal is left at T − 1 while ᾱ_0 stays the same (Lin et al. 2024,
            algorithm 1). Samplers must then start before T − 1.

    Attributes:
        alphas_cumprod: ᾱ_t = Π_{s≤t} (1 − β_s), float64 [T], of the rounded betas.

    Raises:
        UserError: betas are not a non-empty list of numbers in (0, 1].
    """

    betas: Tensor
    zero_terminal_snr: bool = False
    alphas_cumprod: Tensor = field(init=False)

    def __post_init__(self) -> None:
        betas = self.betas.detach().cpu()
        if self.zero_terminal_snr:
            betas = _to_zero_terminal_snr(_checked(betas))
        betas = _checked(betas.to(torch.float32))
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1.0 - betas.double(), dim=0))

    @property
    def num_train(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

    def steps(self, timesteps: Sequence[int], final_alpha_bar: float = 1.0) -> list[Step]:
        """Pair every timestep with the next less noisy one, noisiest first.

        Args:
            timesteps: the visited times in ascending order (repeats allowed), within [0, T).
            final_alpha_bar: ᾱ that the last step ends at. 1 (clean data) for DDIM and DDPM; latent
                diffusion's DDIM stops at ᾱ_0, so it passes ``float(schedule.alphas_cumprod[0])``.

        Raises:
            UserError: timesteps are empty, not ascending, outside [0, T), or include one at which ᾱ is 0 (no signal is
                left there, and samplers divide by √ᾱ); or final_alpha_bar is noisier than the first timestep.
        """
        times = [int(t) for t in timesteps]
        if not times or times != sorted(times) or times[0] < 0 or times[-1] >= self.num_train:
            raise UserError(
                f"the sampling timesteps are {_shortened(times)}; "
                f"give an ascending list within 0 … {self.num_train - 1}"
            )
        bars = [float(self.alphas_cumprod[t]) for t in times]
        if bars[-1] <= 0.0:
            raise UserError(
                f"the noise schedule leaves no signal (ᾱ = 0) at timestep {times[-1]}; start sampling earlier"
            )
        if not bars[0] <= final_alpha_bar <= 1.0:
            raise UserError(
                f"final_alpha_bar is {final_alpha_bar}; give a number between ᾱ at timestep {times[0]} "
                f"({bars[0]:.6f}) and 1"
            )
        pairs = zip(times, bars, [final_alpha_bar, *bars[:-1]], strict=True)
        return [Step(*pair) for pair in pairs][::-1]


def _shortened(times: list[int]) -> str:
    return str(times) if len(times) <= 6 else f"[{times[0]}, {times[1]}, …, {times[-1]}]"


def select_timesteps(kind: SkipKind | str, steps: int, num_train: int, offset: int = 0) -> list[int]:
    """Return the timesteps that a sampler visits, ascending, exactly as the released DDIM code chooses them.

    Two quirks are kept because published results depend on them. ``uniform`` strides by ⌊T/steps⌋, so if ``steps`` does
    not divide T there are more timesteps than requested (300 of 1000 gives 334). ``quad`` repeats early timesteps when
    ``steps`` is large (100 of 1000 starts 0, 0, 0, 0, 1), and it ends at 0.8·T.

    Args:
        kind: ``uniform`` or ``quad``.
        steps: number of sampling steps, 1 … num_train.
        num_train: T, the number of training timesteps.
        offset: added to every timestep. Latent diffusion samples with 1.

    Raises:
        UserError: the kind is unknown, ``steps`` is out of range, or the offset leads beyond the training timesteps.

    Source: DDIM (Song et al. 2021), appendix D.2, and its released code.
    """
    try:
        kind = SkipKind(kind)
    except ValueError:
        names = " or ".join(k.value for k in SkipKind)
        raise UserError(f"skip_type is {kind!r}; choose {names}") from None
    if not 1 <= steps <= num_train:
        raise UserError(f"{steps} sampling steps were requested; give a number from 1 to {num_train}")
    if kind is SkipKind.UNIFORM:
        times = list(range(0, num_train, num_train // steps))
    else:
        times = [int(t) for t in np.linspace(0.0, np.sqrt(num_train * 0.8), steps) ** 2]
    times = [t + offset for t in times]
    if times[0] < 0 or times[-1] >= num_train:
        raise UserError(
            f"{steps} {kind.value} steps with offset {offset} span timesteps {times[0]} … {times[-1]}, but "
            f"the network knows 0 … {num_train - 1}; choose fewer steps, a number that divides {num_train}"
        )
    return times
