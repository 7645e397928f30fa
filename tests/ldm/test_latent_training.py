"""Training of latent models: losses, codebook upkeep, dropped conditions, averages. (The command: tests/scripts.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from ldm.training import ConditionedDenoiser, FirstStageTask, LatentDenoisingTask, latent_moments
from ldm.util import instantiate_from_config

# Relative, of float32 losses computed in another order.
SAME_TOLERANCE = 1e-5
# Relative, of x_0 recovered from x_t at early times, where its share √ᾱ is more than a half.
RECOVERY_TOLERANCE = 1e-3
# Of a share of 4,000 draws: more than four standard errors √(p(1−p)/N).
SHARE_TOLERANCE = 0.03
OPTIM = {"lr": 1e-3, "warmup_steps": 0, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0}
STEPS = 10
CLASSES = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 12, "n_classes": 5}}


@pytest.fixture
def first_stage_task(first_stages, fill, monkeypatch):
    """``first_stage_task("vq" or "kl", weight)``: a task that logs into a dict."""

    def made(kind, weight=0.5):
        model = fill(instantiate_from_config(first_stages[kind]))
        task = FirstStageTask(model, OmegaConf.create({"optim": OPTIM, "regulariser_weight": weight}), STEPS)
        task.logged = {}
        monkeypatch.setattr(
            task, "log", lambda name, value, **_: task.logged.update({name: torch.as_tensor(value).item()})
        )
        return task

    return made


def images(count=3):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_first_stage_loss(kind, first_stage_task):
    task, x = first_stage_task(kind), images()
    torch.manual_seed(3)
    loss = task.training_step([x], 0)
    torch.manual_seed(3)
    reconstruction, regulariser = task.model.reconstruct_with_loss(x)
    expected = ((reconstruction - x).abs().mean() + 0.5 * regulariser).item()
    assert loss.item() == pytest.approx(expected, rel=SAME_TOLERANCE) == task.logged["loss"]
    assert float(regulariser) > SAME_TOLERANCE
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())


def at_step(task, monkeypatch, step):
    monkeypatch.setattr(type(task), "global_step", property(lambda self: step))


def test_idle_codes_are_put_on_encoder_outputs(first_stage_task, monkeypatch):
    task = first_stage_task("vq")
    codes = task.model.quantize.embedding.weight
    with torch.no_grad():
        codes[3:] += 1e3  # far away: never chosen
    at_step(task, monkeypatch, STEPS // 2 - 1)
    task.training_step([images()], 0)
    used, before = set(task.used), codes.detach().clone()
    assert used <= {0, 1, 2}
    task.on_train_epoch_end()
    with torch.no_grad():
        outputs = {tuple(v.tolist()) for v in task.model.encode(images()).permute(0, 2, 3, 1).reshape(-1, 3)}
    for i, code in enumerate(codes.detach()):
        if i in used:
            assert torch.equal(code, before[i])
        else:
            assert min(float((code - torch.tensor(o)).norm()) for o in outputs) < 1e-5
    assert task.logged["idle_codes"] == len(codes) - len(used)
    assert task.used == set()


def test_codes_rest_in_the_second_half(first_stage_task, monkeypatch):
    task = first_stage_task("vq")
    with torch.no_grad():
        task.model.quantize.embedding.weight[3:] += 1e3
    before = task.model.quantize.embedding.weight.detach().clone()
    at_step(task, monkeypatch, STEPS // 2)
    task.training_step([images()], 0)
    task.on_train_epoch_end()
    assert torch.equal(task.model.quantize.embedding.weight, before)
    first_stage_task("kl").on_train_epoch_end()  # has no codes


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_latent_moments(kind, model_config, first_stages, fill):
    model = instantiate_from_config(model_config(first_stage=first_stages[kind]).model)
    fill(model.first_stage_model)
    x = images(5)
    mean, std = latent_moments(model.first_stage_model, x, batch_size=2)
    encoded = model.first_stage_model.encode(x)
    if kind == "vq":
        torch.testing.assert_close(mean, encoded, rtol=1e-4, atol=1e-5)
        assert not std.any()
    else:
        torch.testing.assert_close(mean, encoded.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std.square(), encoded.log_variance.exp(), rtol=1e-4, atol=1e-5)
        assert std.min() > 0


@pytest.fixture
def denoising_task(model_config, fill, monkeypatch):
    """``denoising_task(drop)``: class-conditional where ``drop`` is given; the scale factor is 0.5."""

    def made(drop=None):
        config = model_config() if drop is None else model_config("imagenet", cond_stage_config=CLASSES)
        model = fill(instantiate_from_config(config.model))
        model.scale_factor.fill_(0.5)
        training = OmegaConf.create({"optim": OPTIM, "ema_rate": 0.9, "condition_dropout": drop or 0.0})
        describe = None if drop is None else (lambda labels: labels.tolist())
        task = LatentDenoisingTask(model, training, STEPS, describe, seed=0)
        monkeypatch.setattr(task, "log", lambda *a, **k: None)
        return task, model

    return made


def observed(task, monkeypatch):
    """Let the network see everything and predict zero."""
    seen = {}

    def predict(x, t, values=None):
        seen.update(x=x, t=t, values=values)
        return torch.zeros_like(x)

    monkeypatch.setattr(task.model, "forward", predict)
    return seen


def test_latents_are_sampled_and_scaled(denoising_task, monkeypatch):
    task, model = denoising_task()
    seen = observed(task, monkeypatch)
    draws = []
    randn_like = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: draws.append(randn_like(x)) or draws[-1])
    mean, std = torch.randn(16, 3, 4, 4), torch.rand(16, 3, 4, 4)
    loss = task.training_step([mean, std, torch.zeros(16, dtype=torch.long)], 0)
    drawn, noise = draws
    abar = model.schedule.alphas_cumprod[seen["t"]][:, None, None, None]
    x_0 = (seen["x"] - (1 - abar).sqrt() * noise) / abar.sqrt()
    early = (abar > 0.25).flatten()
    assert int(early.sum()) > 3
    expected = 0.5 * (mean + std * drawn)
    assert float((x_0 - expected)[early].norm() / expected[early].norm()) < RECOVERY_TOLERANCE
    assert float((x_0 - 0.5 * mean)[early].norm() / expected[early].norm()) > RECOVERY_TOLERANCE  # planted
    assert float(loss) == pytest.approx(float(noise.square().mean()), rel=SAME_TOLERANCE)
    assert seen["values"] is None


def test_conditions_are_dropped_at_random(denoising_task, monkeypatch):
    task, model = denoising_task(drop=0.15)
    seen, values = observed(task, monkeypatch), []
    latent, labels = torch.zeros(100, 3, 4, 4), torch.arange(100) % 4
    for _ in range(40):
        task.training_step([latent, latent, labels], 0)
        assert all(v in (label, 4) for v, label in zip(seen["values"], labels.tolist(), strict=True))
        values += seen["values"]
    nothing = model.cond_stage_model.unconditional
    assert values.count(nothing) / len(values) == pytest.approx(0.15, abs=SHARE_TOLERANCE)
    assert values[:100] != values[100:200]
    again, _ = denoising_task(drop=0.15)  # the seed fixes which
    seen = observed(again, monkeypatch)
    again.training_step([latent, latent, labels], 0)
    assert seen["values"] == values[:100]


def test_conditions_reach_the_network_and_their_encoder_learns(denoising_task):
    task, model = denoising_task(drop=0.0)
    x, t = torch.randn(4, 3, 4, 4), torch.tensor([1, 2, 3, 4])
    network = ConditionedDenoiser(model).eval()
    with torch.no_grad():
        one, other = network(x, t, [0, 1, 2, 3]), network(x, t, [0, 1, 2, 2])
        torch.testing.assert_close(one, model.network(x, t, model.condition([0, 1, 2, 3])))
    assert torch.equal(one[:3], other[:3]) and not torch.equal(one[3], other[3])
    task.training_step([x, torch.zeros_like(x), torch.tensor([0, 1, 2, 3])], 0).backward()
    assert model.cond_stage_model.embedding.weight.grad[:4].abs().sum(1).all()


@pytest.mark.parametrize("drop", [None, 0.1])
def test_denoiser_and_encoder_are_optimised_and_averaged(drop, denoising_task):
    task, model = denoising_task(drop)
    trained = dict(model.network.named_parameters())
    if drop is not None:
        trained |= dict(model.cond_stage_model.named_parameters())
    (group,) = task.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in trained.values()}
    frozen = {id(p) for p in model.first_stage_model.parameters()}
    assert not frozen & {id(p) for p in task.parameters()}
    task.on_train_batch_end()
    first = {n: p.clone() for n, p in task.ema.module.named_parameters()}
    with torch.no_grad():
        for p in trained.values():
            p.add_(1.0)
    task.on_train_batch_end()
    moved = dict(task.ema.module.named_parameters())
    assert len(moved) == len(trained)
    for name, value in first.items():
        torch.testing.assert_close(moved[name], value + 0.1, rtol=0, atol=1e-5)


def test_loss_is_the_mean_square_of_the_noise_that_is_missed(denoising_task, monkeypatch):
    task, _ = denoising_task()
    monkeypatch.setattr(task.model, "forward", lambda x, t: torch.ones_like(x))
    noise = torch.randn(2, 3, 4, 4)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    loss = task.denoising_loss(torch.zeros(2, 3, 4, 4))
    assert float(loss) == pytest.approx(float(F.mse_loss(torch.ones_like(noise), noise)), rel=SAME_TOLERANCE)
