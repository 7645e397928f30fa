"""``--layer_bits``: the layers that have widths of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from qdiff.config import LayerBits
from qdiff.errors import UserError
from qdiff.io.yaml_files import read_table

ENTRY = "layer_bits"  # in a file with other entries
NONE = "none"


def read_layer_bits(
    given: str | None, own: Mapping[str, str] = MappingProxyType({}), activations: bool = True
) -> dict[str, LayerBits]:
    """Return widths by layer name from the option's value.

    Args:
        given: ``NAME=WIDTHS`` separated by commas, or a YAML or JSON file: names and widths, or an entry
            ``layer_bits`` with them, or a native checkpoint; ``none`` is no layer, and None those of the method.
        own: the method's.
        activations: whether activations are quantized; if not, the method's layers have no width for them.

    Raises:
        UserError: it is neither, a layer comes twice, or a width is wrong.
    """
    if given is None:
        widths = {name: LayerBits.parse(bits) for name, bits in own.items()}
        return widths if activations else {n: replace(bits, act_bits=None) for n, bits in widths.items()}
    if given == NONE:
        return {}
    is_file = os.path.isfile(given)  # unlike `Path.is_file`, without an error for long lists of layers
    if not is_file and "=" not in given:
        raise UserError(f"--layer_bits {given} is neither a file nor NAME=WIDTHS; give e.g. first=A16,last=W8A16")
    values = _of_file(Path(given)) if is_file else _of_words(given)
    return {name: LayerBits.parse(bits) for name, bits in values.items()}


def of_checkpoint(
    path: str | None, own: Mapping[str, LayerBits], activations: bool, only_weights: bool = False
) -> dict[str, LayerBits]:
    """Return the widths that a calibrated file's layers have of their own, so that nobody has to repeat them.

    Args:
        path: ``--cali_ckpt``. What is no native file has none: published ones do not store widths, and what is wrong
            with others is said where they are loaded.
        own: the method's, for what the file leaves open: inputs, if it holds no ranges of these.
        activations: whether activations are quantized; if not, those of a file that has them are not looked at.
        only_weights: the file's ranges of inputs are not loaded (``--resume_w``), so they leave open what they can.
    """
    from qdiff.checkpoint.metadata import config_if_native  # loads torch, which other files do not need

    there = config_if_native(path)
    if there is None:
        return dict(own)
    found, widths = dict(there.layer_bits), {}
    for name in {**own, **found}:
        # A layer that the file does not name has the network's width there, whatever the method gives it.
        theirs, mine = found.get(name, LayerBits()), own.get(name, LayerBits())
        is_open = theirs.act_bits is None and (only_weights or there.act_bits is None)
        act_bits = mine.act_bits if is_open else theirs.act_bits
        widths[name] = replace(theirs, act_bits=act_bits if activations else None)
    return widths


def _of_words(given: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for word in given.split(","):
        name, _, bits = (part.strip() for part in word.partition("="))
        if name in values:
            raise UserError(f"--layer_bits names {name} twice; name it once")
        if not (name and bits):
            raise UserError(f"--layer_bits has {word!r}, which is not NAME=WIDTHS; give e.g. first=A16,last=W8A16")
        values[name] = bits
    return values


def _of_file(path: Path) -> dict[str, str]:
    if path.suffix == ".safetensors":
        from qdiff.checkpoint.metadata import read_config  # loads torch, which other files do not need

        return read_config(path).to_dict().get(ENTRY, {})
    values = read_table(path)
    inner = values.get(ENTRY, values)
    if not isinstance(inner, Mapping) or not all(isinstance(v, str) for pair in inner.items() for v in pair):
        raise UserError(f"--layer_bits {path} does not hold widths by layer; write lines such as conv_in: W8A16")
    return dict(inner)


def layer_bits_word(layer_bits: tuple[tuple[str, LayerBits], ...]) -> str:
    """Return the option's value for `QuantConfig.layer_bits`."""
    return ",".join(f"{name}={bits}" for name, bits in layer_bits)
