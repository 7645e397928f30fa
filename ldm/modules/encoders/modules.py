"""Condition encoders: class labels and texts → context of the UNet, with the released parameter names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.io.repository import REPOSITORY
from qdiff.io.tokenizer_files import require_tokenizer_files

CLIP_VIT_L_14 = "openai/clip-vit-large-patch14"
# Architecture of CLIP ViT-L/14's text encoder. Stable Diffusion checkpoints hold its weights, so no file is needed.
_CLIP_VIT_L_14_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}


class ClassEmbedder(nn.Module):
    """One learned vector per class; with guidance, the last class stands for "no class".

    Args:
        embed_dim: width of the vector.
        n_classes: number of classes, including "no class".
        key: key of training batches; not used.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @property
    def width(self) -> int:
        """The context's last dimension."""
        return self.embedding.embedding_dim

    @property
    def unconditional(self) -> int:
        """The label that stands for no class."""
        return self.embedding.num_embeddings - 1

    def forward(self, labels: Sequence[int] | Tensor) -> Tensor:
        """Labels [N] → context [N, 1, embed_dim]."""
        labels = torch.as_tensor(labels, dtype=torch.long, device=self.embedding.weight.device)
        return self.embedding(labels)[:, None]


class FrozenCLIPEmbedder(nn.Module):
    """The hidden states of a CLIP text encoder (Radford et al. 2021), padded to its full length.

    The architecture comes from ``version``; weights come with the diffusion checkpoint, or from `load_pretrained`.
    The tokenizer is loaded when the first text is encoded.

    Args:
        version: folder with ``config.json`` and tokenizer files (relative paths also from the repository's root), or
            a name on the Hugging Face hub.
        max_length: number of tokens that texts are padded or cut to; None takes the encoder's maximum.
        device: accepted but not used; tensors go to the device of the weights.
    """

    unconditional = ""

    def __init__(self, version: str = CLIP_VIT_L_14, device: str | None = None, max_length: int | None = None) -> None:
        from transformers import CLIPTextModel

        super().__init__()
        self.version = _local(version)
        config = self._architecture()
        self.max_length = max_length or config.max_position_embeddings
        self.width: int = config.hidden_size  # the context's last dimension
        model = CLIPTextModel(config)
        # In transformers 5 the model itself is the encoder; in 4 it is the model's text_model, as in released names.
        self.transformer = nn.Module()
        self.transformer.text_model = getattr(model, "text_model", model)
        self._tokenizer: Any = None

    def _architecture(self) -> Any:
        from transformers import CLIPTextConfig

        if self.version == CLIP_VIT_L_14:
            return CLIPTextConfig(**_CLIP_VIT_L_14_TEXT)
        return self._from_hub(CLIPTextConfig)

    def _from_hub(self, kind: Any, check: Callable[[str], None] | None = None) -> Any:
        try:
            if check is not None:
                check(self.version)
            return kind.from_pretrained(self.version)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the text encoder {self.version} needs its {kind.__name__} files, which are neither in a local folder "
                "nor in the Hugging Face cache and cannot be downloaded; on a machine with network run `hf download "
                f"{self.version}` and copy the cache (HF_HOME), or name a local folder as "
                "cond_stage_config.params.version"
            ) from error

    def load_pretrained(self) -> None:
        """Load the weights that ``version`` names (if the diffusion checkpoint holds none)."""
        from transformers import CLIPTextModel

        model = self._from_hub(CLIPTextModel)
        self.transformer.text_model.load_state_dict(getattr(model, "text_model", model).state_dict())

    def to_transformers(self) -> Any:
        """Return the encoder as a ``CLIPTextModel`` of transformers with the same weights."""
        from transformers import CLIPTextModel

        encoder = self.transformer.text_model
        model = CLIPTextModel(encoder.config)
        getattr(model, "text_model", model).load_state_dict(encoder.state_dict())
        return model.eval()

    @property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        if self._tokenizer is None:
            self._tokenizer = self._from_hub(CLIPTokenizer, check=require_tokenizer_files)
        return self._tokenizer

    def cut(self, text: str) -> str:
        """Return the end of a text that does not fit into ``max_length`` tokens, "" if everything fits."""
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        kept = self.max_length - 2  # without the start and end tokens
        return self.tokenizer.decode(tokens[kept:]).strip() if len(tokens) > kept else ""

    def forward(self, texts: Sequence[str]) -> Tensor:
        """N texts → context [N, max_length, hidden size]."""
        tokens = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )["input_ids"]
        encoder = self.transformer.text_model
        return encoder(input_ids=tokens.to(next(encoder.parameters()).device)).last_hidden_state


def _local(version: str) -> str:
    """Return the path of a local folder that ``version`` names, or ``version`` as it is."""
    for path in (Path(version), REPOSITORY / version):
        if path.is_dir():
            return str(path)
    return version
