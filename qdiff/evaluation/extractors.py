"""Feature extractors: the networks whose features FID, IS, KID and precision/recall are computed from.

torch-fidelity is imported when an extractor is made, not before: some machines that quantize and sample lack
it.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qdiff.errors import UserError
from qdiff.evaluation.classifier import DigitClassifier
from qdiff.io.repository import REPOSITORY


@dataclass(frozen=True)
class ExtractorSpec:
    """One entry of :data:`EXTRACTORS`.

    Attributes:
        feature_layer: torch-fidelity's name of the features that FID, KID and precision/recall use.
        logits_layer: its name of the logits that IS uses.
        spatial_module: name of the submodule whose map [N, C, h, w] sFID uses.
        classifier: network class with ``prepare(uint8 [N, 3, H, W])`` and ``forward`` returning (features,
            logits); None for an extractor that torch-fidelity has itself.
        weights: bundled safetensors file, relative to the repository; None if none is bundled.
        maker: script that writes it.
        classes: names of the logits, in order; None where they are not the classes that models are asked for.
    """

    feature_layer: str
    logits_layer: str
    spatial_module: str
    classifier: type[nn.Module] | None = None
    weights: str | None = None
    maker: str | None = None
    classes: tuple[str, ...] | None = None

    def layer(self, metric: str) -> str:
        """Return the layer that ``metric`` ("fid", "isc", "kid" or "prc") is computed from."""
        return self.logits_layer if metric == "isc" else self.feature_layer


# A new classifier (say, of CIFAR-10) is one more entry here.
EXTRACTORS: dict[str, ExtractorSpec] = {
    "digits-classifier": ExtractorSpec(
        feature_layer="64",
        logits_layer="logits_unbiased",
        spatial_module="classifier.convolutions",
        classifier=DigitClassifier,
        weights="models/digits_classifier.safetensors",
        maker="scripts/train_extractor.py",
        classes=tuple("0123456789"),
    ),
    # Its 1,008 logits are in an order of their own, not ImageNet's 1,000 classes: no class names.
    # ADM's sFID reads the TF graph's "mixed_6/conv:0": the 1×1 branch of the block that torch calls Mixed_6d.
    "inception-v3-compat": ExtractorSpec(
        feature_layer="2048", logits_layer="logits_unbiased", spatial_module="Mixed_6d.branch1x1"
    ),
}


def extractor_spec(name: str) -> ExtractorSpec:
    """Return the entry called ``name``; an unknown one is a UserError that lists the known ones."""
    if name not in EXTRACTORS:
        raise UserError(f"There is no feature extractor {name!r}: choose one of {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name]


@functools.cache
def extractor_class(name: str) -> type:
    """Return torch-fidelity's class behind ``name``; ours are registered with torch-fidelity the first time.

    After this call ``torch_fidelity.calculate_metrics(feature_extractor=name, ...)`` works as well.

    Raises:
        UserError: if the name is unknown, or torch-fidelity is not installed.
    """
    spec = extractor_spec(name)
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    except ImportError as error:
        raise UserError(
            f"Metrics need the package torch-fidelity, which cannot be imported here ({error}): "
            "install it with 'pip install -c constraints.txt torch-fidelity'."
        ) from error
    if spec.classifier is None:
        return torch_fidelity.FeatureExtractorInceptionV3

    class ClassifierFeatures(FeatureExtractorBase):
        """Adapter from a classifier to the interface torch-fidelity expects (uint8 [N, 3, H, W] in)."""

        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__(name, list(features_list))
            self.classifier = spec.classifier()
            path = Path(feature_extractor_weights_path or REPOSITORY / spec.weights)
            _load_classifier(self.classifier, path, name)
            self.requires_grad_(False)
            self.eval()

        @staticmethod
        def get_provided_features_list():
            return spec.feature_layer, spec.logits_layer

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return spec.layer(metric)

        @staticmethod
        def can_be_compiled():
            return True

        @staticmethod
        def get_dummy_input_for_compile():
            return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

        def forward(self, images):
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(f"expected uint8 images [N, 3, H, W], got {images.dtype} {list(images.shape)}")
            outputs = self.classifier(self.classifier.prepare(images))
            by_layer = dict(zip(self.get_provided_features_list(), outputs, strict=True))
            return tuple(by_layer[layer] for layer in self.features_list)

    torch_fidelity.register_feature_extractor(name, ClassifierFeatures)
    return ClassifierFeatures


def create_extractor(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Make a feature extractor. Nothing is ever downloaded.

    Args:
        name: a key of :data:`EXTRACTORS`.
        weights: weights file. By default the bundled one; for ``inception-v3-compat`` the one that an earlier
            torch-fidelity run left in torch hub's cache.
        device: where the network runs.

    Returns:
        A torch-fidelity feature extractor in eval mode, from uint8 [N, 3, H, W] to the tuple (features
        [N, D], logits [N, classes]).

    Raises:
        UserError: if the name is unknown, torch-fidelity is missing, or the weights are missing or unfit.
    """
    spec = extractor_spec(name)
    make = extractor_class(name)
    path = _inception_weights(weights) if spec.classifier is None else weights
    layers = [spec.feature_layer, spec.logits_layer]
    try:
        extractor = make(name, layers, feature_extractor_weights_path=None if path is None else str(path))
    except RuntimeError as error:  # load_state_dict's word for keys or shapes that do not fit
        raise UserError(
            f"{path} does not hold the weights of {name}: name another file with --extractor-weights PATH."
        ) from error
    return extractor.requires_grad_(False).eval().to(device)


def weights_hash(extractor: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, whatever file or device they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(extractor.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_classifier(classifier: nn.Module, path: Path, name: str) -> None:
    """Load a safetensors file into ``classifier``; every failure is a UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    maker = EXTRACTORS[name].maker
    if not path.is_file():
        raise UserError(
            f"The weights of {name} are missing, there is no file {path}: make it with 'python {maker}' or "
            "name another with --extractor-weights PATH."
        )
    try:
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} does not hold the weights of {name}: make them anew with 'python {maker}' or name "
            "another file with --extractor-weights PATH."
        ) from error


def _inception_weights(weights: str | Path | None) -> Path:
    """Return the path of Inception's weights, checked, so that torch-fidelity has no reason to download."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    path = cached if weights is None else Path(weights)
    if not path.is_file():
        raise UserError(
            f"The weights of inception-v3-compat are missing, there is no file {path}: fetch "
            f"{URL_INCEPTION_V3} and name the file with --extractor-weights PATH."
        )
    try:
        # torch-fidelity unpickles whatever the file holds; a file that passes here holds tensors and no code.
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a readable file of PyTorch weights: fetch {URL_INCEPTION_V3} again and name the "
            "file with --extractor-weights PATH."
        ) from error
    return path
