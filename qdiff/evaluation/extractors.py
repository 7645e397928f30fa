"""Feature extractors: the networks whose features FID, IS, KID and precision/recall are computed from.

torch-fidelity is imported only when an extractor is made, because quantizing and sampling do not need it installed.
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
        feature_layer: torch-fidelity's name for the features that FID, KID and precision/recall use.
        logits_layer: its name for the logits that IS uses.
        spatial_module: name of the submodule whose map [N, C, h, w] sFID uses.
        classifier: network class with ``prepare(uint8 [N, 3, H, W])`` and ``forward`` returning (features,
            logits); None for an extractor that is part of torch-fidelity.
        weights: bundled safetensors file, relative to the repository; None if none is bundled.
        maker: script that writes that file.
        classes: names of the logits, in order; None if they are not the classes of conditional models.
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


# To add a classifier (e.g. of CIFAR-10), add an entry here.
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
    # No class names: its 1,008 logits are not ImageNet's 1,000 classes and have another order.
    # ADM's sFID reads "mixed_6/conv:0" of the TF graph, which is the 1×1 branch of the block Mixed_6d in torch.
    "inception-v3-compat": ExtractorSpec(
        feature_layer="2048", logits_layer="logits_unbiased", spatial_module="Mixed_6d.branch1x1"
    ),
}


def extractor_spec(name: str) -> ExtractorSpec:
    """Return the entry called ``name``; an unknown name is a UserError that lists the known ones."""
    if name not in EXTRACTORS:
        raise UserError(f"there is no feature extractor {name!r}; choose from {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


@functools.cache
def extractor_class(name: str) -> type:
    """Return torch-fidelity's class for ``name``; this project's extractors are registered there on first use.

    After this call ``torch_fidelity.calculate_metrics(feature_extractor=name, ...)`` works as well.

    Raises:
        UserError: the name is unknown, or torch-fidelity is not installed.
    """
    spec = extractor_spec(name)
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    except ImportError as error:
        raise UserError(
            f"metrics need the package torch-fidelity, which cannot be imported here ({error}); "
            "install it with 'pip install -c constraints.txt torch-fidelity'"
        ) from error
    if spec.classifier is None:
        return torch_fidelity.FeatureExtractorInceptionV3

    class ClassifierFeatures(FeatureExtractorBase):
        """Adapts a classifier to torch-fidelity's interface (uint8 [N, 3, H, W] in)."""

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
        weights: weights file; by default the bundled one, or for ``inception-v3-compat`` the file that an earlier
            torch-fidelity run left in torch hub's cache.
        device: device of the network.

    Returns:
        A torch-fidelity feature extractor in eval mode, from uint8 [N, 3, H, W] to the tuple (features
        [N, D], logits [N, classes]).

    Raises:
        UserError: the name is unknown, torch-fidelity is missing, or the weights are missing or do not fit.
    """
    spec = extractor_spec(name)
    make = extractor_class(name)
    path = _inception_weights(weights) if spec.classifier is None else weights
    layers = [spec.feature_layer, spec.logits_layer]
    try:
        extractor = make(name, layers, feature_extractor_weights_path=None if path is None else str(path))
    except RuntimeError as error:  # raised by load_state_dict for keys or shapes that do not fit
        raise UserError(
            f"{path} does not hold the weights of {name}; give another file with --extractor-weights PATH"
        ) from error
    return extractor.requires_grad_(False).eval().to(device)


def weights_hash(extractor: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers; it does not depend on their file or device."""
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
            f"the weights of {name} are missing, there is no file {path}; make it with 'python {maker}' or "
            "give another with --extractor-weights PATH"
        )
    try:
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} does not hold the weights of {name}; make them again with 'python {maker}' or give "
            "another file with --extractor-weights PATH"
        ) from error


def _inception_weights(weights: str | Path | None) -> Path:
    """Check Inception's weights and return their path, so that torch-fidelity does not download them."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    path = cached if weights is None else Path(weights)
    if not path.is_file():
        raise UserError(
            f"the weights of inception-v3-compat are missing, there is no file {path}; download "
            f"{URL_INCEPTION_V3} and give the file with --extractor-weights PATH"
        )
    try:
        # torch-fidelity would unpickle anything; a file that passes this check holds tensors and no code.
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a readable file of PyTorch weights; download {URL_INCEPTION_V3} again and give the "
            "file with --extractor-weights PATH"
        ) from error
    return path
