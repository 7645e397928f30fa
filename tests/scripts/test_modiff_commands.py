"""MoDiff's published commands, word for word but for … and placeholders."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from modulated_runs import SCRIPTS
from run_checks import succeeded

REPOSITORY = Path(__file__).parents[2]
CIFAR = "--config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 --skip_type quad "
LDM = "-r models/ldm/{}/model.ckpt "
PUBLISHED = {
    "cifar generate": (
        "ddim",
        CIFAR + "--generate residual --cali_n 256 --cali_st 20 --cali_data_path cali_data/cifar10.pt",
    ),
    "cifar dynamic": (
        "ddim",
        CIFAR + "--ptq --weight_bit 4 --quant_act --act_bit 4 --a_sym --split --resume --cali_ckpt W.pth "
        "--modulate --quant_mode dynamic --max_images 50000",
    ),
    "church dynamic": (
        "ldm",
        LDM.format("lsun_churches256") + "--batch_size 8 -c 400 -e 0.0 --seed 41 --ptq --weight_bit 4 --quant_act "
        "--act_bit 4 --resume -l OUT --cali_ckpt W.pth --modulate --quant_mode dynamic -n 50000",
    ),
    "church changes": (
        "ldm",
        LDM.format("lsun_churches256") + "--batch_size 8 -c 400 -e 0.0 --seed 41 --ptq --weight_bit 4 --quant_act "
        "--act_bit 4 -l OUT --cali_st 20 --cali_batch_size 32 --cali_n 32 --cali_data_path D.pt --cali_ckpt W.pth "
        "--resume_w --modulate --quant_mode qdiff --cali_min_max -n 50000",
    ),
    "bedroom changes": (
        "ldm",
        LDM.format("lsun_beds256") + "--batch_size 8 -c 200 -e 1.0 --seed 41 --ptq --weight_bit 4 --quant_act "
        "--act_bit 4 -l OUT --cali_st 20 --cali_batch_size 32 --cali_n 32 --cali_data_path D.pt --cali_ckpt W.pth "
        "--resume_w --modulate --quant_mode qdiff --out_penalty 0.5 -n 50000",
    ),
    "stable diffusion": (
        "text",
        '--prompt "a puppet wearing a hat" --plms --cond --ptq --weight_bit 4 --no_grad_ckpt --split --n_samples 5 '
        "--quant_act --act_bit 4 --resume --outdir OUT --cali_ckpt W.pth --modulate --quant_mode dynamic --act_tensor",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_resolve(name, call, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    kind, words = PUBLISHED[name]
    before = {p.name for p in REPOSITORY.iterdir()}
    outcome = succeeded(call(SCRIPTS[kind], *shlex.split(words), "--dry-run"))
    notes = {"stable diffusion": "is missing; the bundled model", "church": "500 steps are taken"}
    note = next((text for part, text in notes.items() if part in name), "")
    assert note in outcome.err and outcome.err.count("\n") == bool(note)
    assert not {p.name for p in REPOSITORY.iterdir()} - before & {"OUT", "cali_data"}
    config = json.loads(outcome.out)
    if name == "cifar generate":
        recorded = config["generate"]
        assert config["ptq"] is None and (recorded["pairs"], recorded["per_step"]) == (True, 256)
        assert recorded["out"] == "cali_data/cifar10.pt" and len(recorded["calls"]) == 20
        assert min(recorded["calls"]) == 1 and max(recorded["calls"]) < 100
        return
    plan, dynamic = config["ptq"], "--quant_mode dynamic" in words
    assert config["method"] == "modiff" and plan["checkpoint"] == "W.pth"
    assert plan["action"] == ("load" if dynamic else "activations")
    quant = plan["quant"]
    assert (quant["weight_bits"], quant["act_bits"], quant["modulate"]) == (4, 4, True)
    assert quant.get("act_dynamic", False) is dynamic
    assert quant.get("act_scale_per", "tensor") == ("sample" if kind == "text" else "tensor")
    assert quant["act_symmetric"] is quant["split_shortcut"] is True or name != "cifar dynamic"
    if dynamic:
        assert "changes" not in plan
    else:
        changes = plan["changes"]
        assert (plan["steps"], plan["per_step"], plan["data"], changes["batch_size"]) == (20, 32, "D.pt", 32)
        assert changes["learn"] is ("--cali_min_max" not in words)
        assert changes["out_penalty"] == (0.5 if "--out_penalty" in words else 0.0)
        assert (changes["iterations"], changes["lr"], changes["p"]) == (5000, 4e-4, 2.4)
    if kind == "ldm":
        assert config["num_images"] == 50_000 and config["sampler"]["steps"] == (400 if "church" in name else 200)
