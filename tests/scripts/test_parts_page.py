"""docs/parts.md against what the commands accept."""

from __future__ import annotations

import functools
import json
import re

import pytest

from qdiff.io.repository import REPOSITORY

DDIM = (
    "--config configs/digits.yml --use_pretrained --timesteps 20 --max_images 8 --ptq --weight_bit 4 --quant_act "
    "--act_bit 8 --cali_st 20 --cali_n 32 --dry-run"
)
TEXT = (
    "--config models/ldm/digits_text/config.yaml --prompt three --plms --ddim_steps 20 --cond --ptq --weight_bit 4 "
    "--quant_act --act_bit 8 --cali_st 20 --cali_n 8 --dry-run"
)
MODULATION = "--quant_mode dynamic --modulate"


def rows() -> dict[str, dict[str, str]]:
    """Return the answers of the page's table by option and by the method's options."""
    text = (REPOSITORY / "docs" / "parts.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines() if "|" in line]
    heading, _, *parts = lines
    found = {}
    for _, option, *answers in parts:
        told = found[option.split("`")[1]] = {}
        for methods, answer in zip(heading[2:], answers, strict=True):
            if "modulate" in methods:
                told[MODULATION] = answer
                continue
            for method in re.findall(r"[\w-]+", methods):
                told["--quant_mode linear" if method == "linear" else f"--method {method}"] = answer
    return found


ROWS = rows()
PARTS = {
    *("--act_ranges timestep", "--temporal_unit", "--cache_temporal", "--weight_start gptq", "--bias_correction"),
    *("--scaling search", "--scaling learned", "--power_of_two_scales", "--noise_correction d2", "--refit 1"),
    *("--layer_bits first=A16,last=W8A16", "--target_bits 4.5", "--bos_aware"),
}


def test_no_part_is_missing():
    assert ROWS.keys() == PARTS


@pytest.fixture(scope="module")
def without_parts(call):
    """``without_parts(script, words)``: what a dry run prints, each once."""
    return functools.cache(lambda script, words: json.loads(call(script, *words.split()).out))


@pytest.mark.slow
@pytest.mark.parametrize("part", ROWS)
def test_the_commands_say_what_the_page_says(part, call, without_parts, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    script, words = ("txt2img", TEXT) if part == "--bos_aware" else ("sample_diffusion_ddim", DDIM)
    assert len(ROWS[part]) == 9
    for method, answer in ROWS[part].items():
        given = call(script, *words.split(), *method.split(), *part.split())
        if answer == "no":
            assert given.code == 2 and part.split()[0] in given.err, (method, given.err)
            continue
        assert given.code == 0, (method, given.err)
        # Looking outputs up gives the same bits, so it is no part of the configuration.
        has_it_already = (
            json.loads(given.out) == without_parts(script, f"{words} {method}") and part != "--cache_temporal"
        )
        assert answer in ("yes", "default") and has_it_already == (answer == "default"), method
