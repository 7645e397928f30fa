"""CLIP score: how well images agree with the texts they were made from, by the angle of their CLIP embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.errors import UserError, first_line
from qdiff.evaluation.extractors import weights_hash
from qdiff.evaluation.image_sets import ImageSet
from qdiff.evaluation.subject import Subject
from qdiff.io.progress import progress_bar, tracked
from qdiff.io.tokenizer_files import require_tokenizer_files

CLIP_VIT_L_14 = "openai/clip-vit-large-patch14"
_LEGACY_EOS = 2  # in OpenAI's configs; transformers then takes the highest token number for the end of a text
_REMEDY = (
    f"name a folder that holds one (https://huggingface.co/{CLIP_VIT_L_14}) with --clip-model FOLDER, or fetch it "
    "into the Hugging Face cache with --download"
)


@dataclass(frozen=True)
class Clip:
    name: str
    model: nn.Module
    tokenizer: Any
    processor: Any
    max_tokens: int  # of a text, start and end included
    hash: str


def clip_score(subject: Subject) -> dict[str, Any]:
    """Return `clip_scores` of a subject's images and prompts. It takes long enough on a CPU to show its bars always."""
    return clip_scores(subject.images, subject.prompts, subject.clip, device=subject.device)


def clip_scores(
    images: ImageSet,
    prompts: Sequence[str],
    model: str | Path | Clip = CLIP_VIT_L_14,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    download: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute the CLIP score of images and the prompts they were sampled with.

    Hessel et al. (2021, "CLIPScore", section 3) define w·max(cos(image, text), 0) with w = 2.5. What papers on Stable
    Diffusion print (31.5 for the float v1.4 with ViT-L/14) has w = 100, and so has this.

    Args:
        images: N of them, of any size: they are resized (bicubic), cropped to the middle square and normalised as the
            model's own image processor does. transformers 5 resizes with torchvision; few pixels differ from Pillow's,
            by one of 255 levels.
        prompts: N texts, image i's at place i. Longer ones than the model takes (77 tokens) are cut.
        model: a folder with a CLIP model as transformers saves it (config, weights, tokenizer, preprocessor), or its
            name on the Hugging Face hub, to be found in the cache; or what `load_clip` returned. Numbers of different
            models cannot be compared.
        batch_size: images, and texts, at a time.
        device: where the model runs, in float32.
        download: fetch what is neither a folder nor in the cache.
        progress: show progress bars.

    Returns:
        ``clip_score``: mean over images of 100·max(cos(image embedding, text embedding), 0), from 0 to 100.
        ``clip_score_spread``: standard deviation of that over images.
        ``clip_truncated``: how many of the N prompts were cut.
        ``clip_model``: its folder or name.
        ``clip_weights_hash``: SHA-256 of its weights in float32, the same wherever they were loaded from.

    Raises:
        UserError: not one prompt per image, or the model is missing, incomplete, damaged, or not of one piece.
    """
    if isinstance(prompts, str) or len(prompts) != len(images):
        count = "one string" if isinstance(prompts, str) else len(prompts)
        raise UserError(
            f"The CLIP score of {len(images)} images needs as many prompts, not {count}: give one per image."
        )
    clip = model if isinstance(model, Clip) else load_clip(model, download)
    clip.model.to(device)
    with (
        torch.inference_mode(),
        # Disable TF32 so results do not depend on the GPU, also where no script has done so.
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        distinct = list(dict.fromkeys(prompts))
        texts, is_cut = _embed_texts(clip, distinct, batch_size, progress)
        place = {prompt: i for i, prompt in enumerate(distinct)}
        order = torch.tensor([place[prompt] for prompt in prompts])
        cosines = []
        with progress_bar(len(images), "CLIP images", "img", disable=not progress) as bar:
            for batch, places in zip(images.batches(batch_size), order.split(batch_size), strict=True):
                embedded = _embed_images(clip, batch)
                cosines.append((embedded * texts[places.to(texts.device)]).sum(1).double().cpu())
                bar.update(len(batch))
    scores = 100 * torch.cat(cosines).clamp(min=0)
    return {
        "clip_score": float(scores.mean()),
        "clip_score_spread": float(scores.std(correction=0)),
        "clip_truncated": int(is_cut[order].sum()),
        "clip_model": clip.name,
        "clip_weights_hash": clip.hash,
    }


def _embed_texts(clip: Clip, texts: list[str], batch_size: int, progress: bool) -> tuple[Tensor, Tensor]:
    """N texts → their directions [N, D], and whether each was cut, bool [N]."""
    embedded, is_cut = [], []
    starts = range(0, len(texts), batch_size)
    for start in tracked(starts, "CLIP texts", "batch", disable=not progress):
        batch = texts[start : start + batch_size]
        is_cut += [len(tokens) > clip.max_tokens for tokens in clip.tokenizer(batch, verbose=False)["input_ids"]]
        tokens = clip.tokenizer(
            batch, truncation=True, max_length=clip.max_tokens, padding="max_length", return_tensors="pt"
        )
        device = next(clip.model.parameters()).device
        out = clip.model.get_text_features(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        )
        embedded.append(_direction(out))
    return torch.cat(embedded), torch.tensor(is_cut)


def _embed_images(clip: Clip, batch: Tensor) -> Tensor:
    """uint8 [n, 3, H, W] → directions [n, D]."""
    pixels = _pixels(clip.processor, batch)
    return _direction(clip.model.get_image_features(pixel_values=pixels.to(next(clip.model.parameters()).device)))


def _pixels(processor: Any, batch: Tensor) -> Tensor:
    # Said, not guessed: three rows of pixels would be taken for channels.
    return processor(images=list(batch), input_data_format="channels_first", return_tensors="pt")["pixel_values"]


def _direction(features: Any) -> Tensor:
    """Return embeddings of length 1; transformers 5 wraps them, 4 does not."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


# ---------------------------------------------------------------------- loading


def load_clip(model: str | Path = CLIP_VIT_L_14, download: bool = False) -> Clip:
    """Load all parts of a CLIP model and check that they belong together: transformers fills gaps without a word.

    Args:
        model, download: see `clip_scores`.

    Raises:
        UserError: the model is missing, incomplete, damaged, or not of one piece.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    place = _locate(model, download)
    source = {"pretrained_model_name_or_path": place, "local_files_only": not download}
    # Small parts first: what is missing should show before gigabytes are read or fetched.
    _part(model, "tokenizer", lambda: require_tokenizer_files(place, local_files_only=not download))
    tokenizer = _part(model, "tokenizer", lambda: CLIPTokenizer.from_pretrained(**source))
    processor = _part(model, "image processor", lambda: CLIPImageProcessor.from_pretrained(**source))
    network, loading = _part(
        model, "weights", lambda: CLIPModel.from_pretrained(**source, output_loading_info=True), download
    )
    gaps = sorted({*loading["missing_keys"], *(str(k) for k in loading["mismatched_keys"])})
    if gaps:  # transformers draws them at random
        raise UserError(f"The weights of the CLIP model {model} lack {len(gaps)} tensors (e.g. {gaps[0]}): {_REMEDY}.")
    # As it was saved in half precision, transformers 5 would leave it.
    network = network.float().requires_grad_(False).eval()
    _check_fit(model, network, tokenizer, processor)
    max_tokens = network.config.text_config.max_position_embeddings
    return Clip(str(model), network, tokenizer, processor, max_tokens, weights_hash(network))


def _locate(model: str | Path, download: bool) -> str:
    """Return a folder that exists, or the hub's name of a model to download."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_dir():
        return str(model)
    if isinstance(model, str):
        if download:
            return model
        # Given a name, the hub's client may send a request in spite of local_files_only; given a folder, it has no
        # reason to.
        with contextlib.suppress(ValueError):  # no name that a model could have
            if isinstance(config := try_to_load_from_cache(model, "config.json"), str):
                return str(Path(config).parent)
    raise UserError(f"There is no CLIP model {model}, neither as a folder nor in the Hugging Face cache: {_REMEDY}.")


def _part(model: str | Path, what: str, load: Callable[[], Any], download: bool = False) -> Any:
    try:
        with _quiet(progress=download):
            return load()
    except Exception as error:  # damaged files stop their readers in any way
        raise UserError(
            f"The {what} of the CLIP model {model} cannot be loaded ({first_line(error)}): {_REMEDY}."
        ) from error


def _check_fit(model: str | Path, network: nn.Module, tokenizer: Any, processor: Any) -> None:
    """Raise a `UserError` where parts of different models lie side by side."""
    text, side = network.config.text_config, network.config.vision_config.image_size
    highest = max(tokenizer.get_vocab().values())
    end = highest if text.eos_token_id == _LEGACY_EOS else text.eos_token_id
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        wrong = f"its tokenizer has {len(tokenizer)} tokens and its text encoder {text.vocab_size}"
    elif highest >= text.vocab_size:
        wrong = f"its tokenizer's tokens go up to number {highest}, its text encoder's to {text.vocab_size - 1}"
    elif tokenizer.eos_token_id != end:
        # The encoder would not find the end, and give every text the embedding of its first token.
        wrong = f"its tokenizer ends texts with token {tokenizer.eos_token_id}, its text encoder with {end}"
    elif (made := _pixels(processor, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[-2:]) != (side, side):
        wrong = f"its preprocessor makes images of {made[1]}×{made[0]} pixels and its image encoder takes {side}×{side}"
    else:
        return
    raise UserError(f"The files of the CLIP model {model} do not belong together, {wrong}: {_REMEDY}.")


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep transformers from printing a table of what does not fit, and a bar for what takes a second."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
