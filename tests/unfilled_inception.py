"""The real Inception architecture with convolutions drawn at random: its published weights have 95 MB."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.evaluation.extractors import extractor_class

INCEPTION = "inception-v3-compat"


def drawn_inception(generator: torch.Generator) -> nn.Module:
    """Return the extractor with drawn convolutions and reset statistics; the rest of its parameters is not set."""
    make = extractor_class(INCEPTION)
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(make, "load_state_dict", lambda self, state: None)
        made = make(INCEPTION, ["2048", "logits"], feature_extractor_weights_path="-")
    made = made.to_empty(device="cpu")
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    return made
