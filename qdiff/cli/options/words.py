"""The command-line options of a quantization, from its config: what a command needs to load its checkpoint."""

from __future__ import annotations

from qdiff.cli.options.layer_bits import layer_bits_word
from qdiff.config import ActRanges, QuantConfig, ScalePer


def quantization_words(quant: QuantConfig) -> list[str]:
    """Return the options with which `resolve_ptq` gives this config, apart from how ranges were chosen.

    Args:
        quant: with a width for weights, without modulation.
    """
    made: list[object] = ["--ptq", "--weight_bit", quant.weight_bits]
    if quant.act_bits is not None:
        made += ["--quant_act", "--act_bit", quant.act_bits]
    if quant.softmax_bits != QuantConfig.softmax_bits:
        made += ["--sm_abit", quant.softmax_bits]
    for option, given in (
        ("--split", quant.split_shortcut),
        ("--a_sym", quant.act_symmetric),
        ("--w_sym", quant.weight_symmetric),
        ("--keep_ends", quant.keep_ends),
        ("--bos_aware", quant.bos_aware),
    ):
        made += [option] if given else []
    if quant.act_dynamic:
        made += ["--quant_mode", "dynamic"]
    if quant.act_scale_per is not ScalePer.TENSOR:
        made += ["--act_scale_per", quant.act_scale_per.value]
    if quant.act_ranges is not ActRanges.SHARED:
        made += ["--act_ranges", quant.act_ranges.value]
    if quant.power_of_two_scales:
        made.append("--power_of_two_scales")
    if quant.rest_bits is not None:
        made += ["--rest_abit", quant.rest_bits]
    if quant.layer_bits:
        made += ["--layer_bits", layer_bits_word(quant.layer_bits)]
    return [str(word) for word in made]
