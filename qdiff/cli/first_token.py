"""``--bos_aware``: whether a model's contexts begin with the same token, asked before anything is calibrated."""

from __future__ import annotations

import torch

from qdiff.calibration.first_token import LEAVE_OUT, NO_READER, find_first_tokens
from qdiff.cli.options.ptq import PtqPlan
from qdiff.errors import UserError
from qdiff.pipeline import Pipeline

LOOKED_AT = 8  # texts of the run, and of its calibration


def check_has_text(plan: PtqPlan | None, pipeline: Pipeline) -> None:
    """Raise a `UserError` if a plan is BOS-aware and the model has no context of several tokens.

    Args:
        pipeline: no weights need be loaded. The network of a diffusers pipeline is only known when they are.
    """
    if plan is None or not plan.quant.bos_aware:
        return
    try:
        _, shape = pipeline.build_network()
    except NotImplementedError:
        return
    if shape is None or shape[0] < 2:
        has = "takes no context" if shape is None else "has a context of one token"
        raise UserError(f"--bos_aware needs a model with a text encoder, and {pipeline.name} {has}; leave it out")


@torch.no_grad()
def check_first_tokens(plan: PtqPlan, pipeline: Pipeline) -> None:
    """Raise a `UserError` if a plan is to make outputs of the first token constants, and it is not always the same.

    Likewise if all layers that read it stay in float.

    The first texts of the run and of its calibration are compared, and the empty text of guidance. What comes later is
    compared where the calibration set is read, and while sampling.

    Args:
        pipeline: its float network is loaded, and not wrapped.
    """
    if not plan.quant.bos_aware or plan.action == "load":
        return
    x, t, *contexts = pipeline.probe()
    if not contexts:
        raise UserError(f"--bos_aware needs a model with a text encoder; {LEAVE_OUT}")
    for calibration in (True, False):
        halves = pipeline.conditions(range(min(LOOKED_AT, pipeline.count)), calibration)
        contexts += [half for half in halves if half is not None]
    context = torch.cat([c.to(contexts[0].device) for c in contexts])
    first = (part[:1].expand(len(context), *part.shape[1:]) for part in (x, t))
    found = find_first_tokens(pipeline.network, (*first, context))
    widths = [plan.quant.of_layer(name, None) for name in found]
    if all(own.weight_bits is None and own.act_bits is None for own in widths):
        raise UserError(NO_READER)
