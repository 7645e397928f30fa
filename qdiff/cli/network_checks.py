"""Whether a model has what a plan needs, asked when its network is loaded and before anything else is done."""

from __future__ import annotations

from qdiff.calibration.collect import check_draw
from qdiff.calibration.temporal_unit import known_temporal_parts
from qdiff.cli.first_token import check_first_tokens
from qdiff.cli.options.ptq import PtqPlan
from qdiff.pipeline import Pipeline


def check_network(plan: PtqPlan, pipeline: Pipeline) -> None:
    """Raise a `UserError` if a plan cannot be carried out for a network.

    Args:
        pipeline: its float network is loaded, and not wrapped.
    """
    if plan.draw is not None and plan.records:
        check_draw(pipeline.network, plan.draw)
    if getattr(plan.recipe, "temporal_unit", False):
        known_temporal_parts(pipeline.network)
    check_first_tokens(plan, pipeline)
