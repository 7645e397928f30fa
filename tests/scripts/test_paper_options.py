"""Every option of the papers' scripts is known, and those of docs/options-of-the-papers.md do what its table says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from run_checks import succeeded

from qdiff.cli.options.paper_options import REFUSED

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "options-of-the-papers.md"

PTQ = (
    "--ptq --quant_act --weight_bit --act_bit --quant_mode --cali_st --cali_batch_size --cali_n --cali_iters "
    "--cali_iters_a --cali_lr --cali_p --cali_ckpt --cali_data_path --resume_w --cond --running_stat "
    "--sm_abit --verbose"
)
MODIFF = "--modulate --act_tensor --out_penalty --cali_min_max --generate"
EDA_DM = (
    "--device --a_sym --split --calib_im_mode --calib_t_mode --calib_num_samples --batch_samples --recon --add_loss "
    "--lr_w --lr_a --lamda"
)
DDIM = (
    "--config --seed -l --logdir --use_pretrained --sample_type --skip_type --timesteps --eta --sequence --max_images"
)
UNCONDITIONAL = "-r -n --n_samples -e --eta -v --vanilla_sample --seed -l --logdir -c --custom_steps --batch_size --dpm"
GUIDED = (
    "--skip_grid --skip_save --ddim_steps --ddim_eta --n_samples --n_rows --scale --config --ckpt --seed --precision "
    "--no_grad_ckpt --split"
)
TEXT = "--prompt --plms --laion400m --fixed_code --n_iter --H --W --C --f --from-file"
# script → the options of all papers that have it
PUBLISHED = {
    "sample_diffusion_ddim": f"{DDIM} {PTQ} {MODIFF} {EDA_DM} --resume --change_block_recon --class_cond --block_recon "
    "--layer_recon --model_dir",
    "sample_diffusion_ldm": f"{UNCONDITIONAL} {PTQ} {MODIFF} --resume_base --resume --a_min_max --rs_sm_only",
    "sample_diffusion_ldm_bedroom": f"{UNCONDITIONAL} {EDA_DM} --resume --dataset --class_cond",
    "sample_diffusion_ldm_church": f"{UNCONDITIONAL} {EDA_DM} --resume --dataset --class_cond",
    "sample_diffusion_ldm_imagenet": f"{GUIDED} {EDA_DM} --n_batch --dataset -l --logdir --cond",
    "txt2img": f"{GUIDED} {TEXT} {PTQ} --outdir --resume --rs_sm_only --modulate --act_tensor",
    "sample_txt2img": f"{GUIDED} {TEXT} {EDA_DM} --n_batch --dataset -l --logdir",
}
NEEDED = {
    "sample_diffusion_ddim": "--config configs/digits.yml --use_pretrained --timesteps 10 --max_images 2",
    "sample_diffusion_ldm": "-r models/ldm/digits_vq --seed 1 -n 2 -c 10",
    "sample_diffusion_ldm_bedroom": "-r models/ldm/digits_vq -n 2 -c 10",
    "sample_diffusion_ldm_church": "-r models/ldm/digits_kl -n 2 -c 10",
    "sample_diffusion_ldm_imagenet": "--n_samples 2 --ddim_steps 10",
    "txt2img": "--n_samples 2 --ddim_steps 10",
    "sample_txt2img": "--n_samples 2 --ddim_steps 10",
}


def rows() -> list[tuple[list[str], str]]:
    """Return the words of each option of the table, and what happens to it here."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(shlex.split(option.strip("`")), scripts + ": " + here) for option, scripts, here, _ in cells]


def scripts_of(row: str) -> list[str]:
    where = row.split(":")[0]
    if "`" in where:
        return [name.strip(" `") for name in where.split(",")]
    latent = [name for name in NEEDED if name != "sample_diffusion_ddim"]
    guided = ["sample_diffusion_ldm_imagenet", "txt2img", "sample_txt2img"]
    edas = [name for name in latent if name not in ("sample_diffusion_ldm", "txt2img")]
    return {"all": list(NEEDED), "EDA-DM's latent scripts": edas, "latent, conditional": guided}[where]


@pytest.fixture
def dry_run(call, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    return lambda script, *more: call(script, *NEEDED[script].split(), "--dry-run", *more)


@pytest.mark.parametrize("script", PUBLISHED)
def test_every_published_option_is_known(script, call):
    words = succeeded(call(script, "--help")).out.replace(",", " ").replace("[", " ").replace("]", " ").split()
    assert [option for option in PUBLISHED[script].split() if option not in words] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "here"), rows(), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_the_table_tells_the_truth(option, here, dry_run):
    for script in scripts_of(here):
        if "refused" in here:
            line = dry_run(script, *option).err.splitlines()[-1]
            assert line.startswith(f"error: {' '.join(option)} ") and "; " in line
            assert "invalid choice" not in line
        else:
            beside = ["--ptq", "--calib_im_mode", "greedy"] if "beside" in here else []
            with_it, without = (json.loads(succeeded(dry_run(script, *beside, *o)).out) for o in (option, []))
            assert with_it == without


def test_all_that_is_refused_is_in_the_table():
    listed = {tuple(option) for option, here in rows() if "refused" in here}
    known = {(f"--{o}", *([] if value is True else [value])) for o, values in REFUSED.items() for value in values}
    assert listed == known


@pytest.mark.parametrize("value", ["greedy", "noise_backward_t", "Q_diffusion"])
def test_choices_of_the_paper_are_taken(value, dry_run):
    succeeded(dry_run("sample_diffusion_ddim", "--ptq", "--calib_im_mode", value))


@pytest.mark.parametrize("option", REFUSED)
def test_unknown_choices_are_still_refused(option, dry_run):
    given = [f"--{option}", *([] if option == "laion400m" else ["other"])]
    assert dry_run("txt2img", "--ptq", *given).code == 2
