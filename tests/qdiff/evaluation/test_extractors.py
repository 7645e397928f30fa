"""The extractors: what they return, where their weights come from, what they say when they cannot work."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.model_selection import train_test_split

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation import extractors
from qdiff.evaluation.classifier import DigitClassifier
from qdiff.evaluation.extractors import (
    EXTRACTORS,
    create_extractor,
    extractor_class,
    weights_hash,
)
from qdiff.io.repository import REPOSITORY

DIGITS = "digits-classifier"
INCEPTION = "inception-v3-compat"
WEIGHTS = REPOSITORY / EXTRACTORS[DIGITS].weights
BATCH_TOLERANCE = 1e-4  # another batch size, another convolution kernel; features have variance 1


@pytest.fixture(scope="module")
def digits():
    """All digits as uint8 [1797, 3, 16, 16], and their labels."""
    images, labels = load_digit_images(16)
    return torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels)


def test_bundled_weights_reach_the_accuracy_they_claim_on_the_held_out_digits(extractor, digits):
    images, labels = digits
    _, held_out = train_test_split(range(len(images)), test_size=360, random_state=0, stratify=labels)
    _, logits = extractor(images[held_out])
    accuracy = (logits.argmax(dim=1) == labels[held_out]).double().mean().item()
    with safe_open(WEIGHTS, "pt") as file:
        about = file.metadata()
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(float(about["test_accuracy"]), abs=1.5 / 360)  # one near-tie may flip
    assert about["seed"] == "0" and about["command"].startswith("python scripts/train_extractor.py")


def test_the_classifier_is_small_and_takes_any_size():
    model = DigitClassifier().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 131_424
    for size in ((16, 16), (8, 8), (32, 20)):
        features, logits = model(torch.zeros(2, 1, *size))
        assert features.shape == (2, 64) and logits.shape == (2, 10)


def test_enlarged_digits_keep_their_labels(extractor, digits):
    images, labels = digits[0][:200], digits[1][:200]
    large = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    assert (extractor(large)[1].argmax(dim=1) == labels).double().mean() >= 0.95


def test_prepare_spans_minus_one_to_one_and_keeps_grey():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    prepared = DigitClassifier.prepare(grey.expand(-1, 3, -1, -1))
    assert prepared.shape == (1, 1, 16, 16)
    assert prepared.min() == -1 and prepared.max() == 1
    assert torch.equal(prepared, DigitClassifier.prepare(grey))


def test_outputs_come_in_the_order_asked_for(digits):
    images = digits[0][:4]
    make = extractor_class(DIGITS)
    features, logits = make(DIGITS, ["64", "logits_unbiased"])(images)
    swapped = make(DIGITS, ["logits_unbiased", "64"])
    assert torch.equal(swapped(images)[0], logits) and torch.equal(swapped(images)[1], features)
    (alone,) = make(DIGITS, ["64"])(images)
    assert torch.equal(alone, features) and features.shape == (4, 64) and logits.shape == (4, 10)


def test_an_image_has_the_same_features_alone_and_in_a_batch(extractor, digits):
    images = digits[0][:8]
    batch, alone = extractor(images)[0], extractor(images[:1])[0]
    assert (batch[:1] - alone).abs().max() < BATCH_TOLERANCE
    # The planted error: in train mode the normalisation looks at the batch.
    forgetful = create_extractor(DIGITS).train()
    assert (forgetful(images)[0] - batch).abs().max() > 100 * BATCH_TOLERANCE


def test_float_images_are_refused(extractor):
    with pytest.raises(ValueError, match="uint8"):
        extractor(torch.zeros(1, 3, 16, 16))


def test_registered_with_torch_fidelity_under_its_name(extractor):
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    assert FEATURE_EXTRACTORS_REGISTRY[DIGITS] is extractor_class(DIGITS) is type(extractor)
    assert isinstance(extractor, FeatureExtractorBase) and extractor.get_name() == DIGITS
    assert not extractor.training and not any(p.requires_grad for p in extractor.parameters())


@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_entry_names_layers_that_its_class_provides_and_prefers(name):
    spec, made = EXTRACTORS[name], extractor_class(name)
    for metric in ("fid", "kid", "isc"):
        assert spec.layer(metric) in made.get_provided_features_list()
        assert spec.layer(metric) == made.get_default_feature_layer_for_metric(metric)


def test_weights_hash_belongs_to_the_numbers_not_to_the_file(extractor, tmp_path):
    tensors = load_file(WEIGHTS)
    save_file(tensors, tmp_path / "copy.safetensors", metadata={"note": "other bytes"})
    assert weights_hash(create_extractor(DIGITS, tmp_path / "copy.safetensors")) == weights_hash(extractor)
    tensors["head.weight"][0, 0] += 1e-6
    save_file(tensors, tmp_path / "changed.safetensors")
    assert weights_hash(create_extractor(DIGITS, tmp_path / "changed.safetensors")) != weights_hash(extractor)


def test_missing_weights_say_where_and_how_to_mend(tmp_path):
    missing = tmp_path / "none.safetensors"
    with pytest.raises(UserError, match=r"no file .*none\.safetensors.*train_extractor\.py.*--extractor-weights"):
        create_extractor(DIGITS, missing)


@pytest.mark.parametrize("content", ["garbage", "other tensors"])
def test_unfit_weights_are_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content == "garbage":
        path.write_bytes(b"this is no safetensors file")
    else:
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="does not hold the weights of digits-classifier"):
        create_extractor(DIGITS, path)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'vgg'.*digits-classifier, inception-v3-compat"):
        create_extractor("vgg")
    with pytest.raises(AttributeError):
        _ = extractors.NoSuchThing


def test_without_torch_fidelity_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"pip install -c constraints\.txt torch-fidelity"):
        extractor_class.__wrapped__(DIGITS)  # past the cache


@pytest.mark.slow
def test_importing_the_room_does_not_import_torch_fidelity():
    code = (
        "import sys, qdiff.evaluation.metrics, qdiff.evaluation.reference, qdiff.evaluation.extractors\n"
        "sys.exit('torch_fidelity' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.fixture
def no_download(monkeypatch, tmp_path):
    """An empty torch hub cache, and a download that fails the test."""
    from torch_fidelity import feature_extractor_inceptionv3

    def download(*args, **kwargs):
        pytest.fail("tried to download")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_inception_without_weights_names_the_address_and_downloads_nothing(no_download, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    for weights in (None, tmp_path / "none.pth"):
        with pytest.raises(UserError) as caught:
            create_extractor(INCEPTION, weights)
        assert URL_INCEPTION_V3 in str(caught.value) and "--extractor-weights PATH" in str(caught.value)


def test_inception_refuses_unfit_and_unsafe_files(no_download, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable file of PyTorch weights"):
        create_extractor(INCEPTION, path)
    torch.save(print, path)  # any pickled function could as well be a harmful one
    with pytest.raises(UserError, match="not a readable file of PyTorch weights"):
        create_extractor(INCEPTION, path)
    torch.save({"fc.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="does not hold the weights of inception-v3-compat"):
        create_extractor(INCEPTION, path)


@pytest.mark.slow
def test_inception_loads_from_a_named_file_and_from_the_hub_cache(no_download, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        inception = extractor_class(INCEPTION)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(inception, "load_state_dict", lambda self, state: None)
        state = inception(INCEPTION, ["2048"], feature_extractor_weights_path="-").state_dict()
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    state["fc.weight"] += 1.0
    cached = tmp_path / "hub" / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    from_cache, named = create_extractor(INCEPTION), create_extractor(INCEPTION, cached)
    assert weights_hash(from_cache) == weights_hash(named)
    assert torch.equal(named.fc.weight, torch.ones(1008, 2048))
    features, logits = named(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
