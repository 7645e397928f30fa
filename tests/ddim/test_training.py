"""The training task: the DDPM loss, the EMA of the weights, warm-up and cosine decay. (The command: tests/scripts.)"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ddim.datasets import load_training_images, load_training_labels
from ddim.training import NoisePredictionTask
from qdiff.errors import UserError

# Relative, of the loss: the noise is recovered from float32 images by dividing by √(1−ᾱ), which is 0.01 at t = 0 and
# amplifies rounding a hundred times.
RECOVERY_TOLERANCE = 1e-3
# Mean and variance of more than 1,500 standard normal numbers: more than three standard errors 1/√N and √(2/N).
NORMAL_TOLERANCE = 0.12
EMA_TOLERANCE = 1e-6  # absolute, of weights below 2 in float32
# What a perfect prediction may cost: float32 rounding, squared.
PERFECT_LOSS = 1e-6
STEPS, WARMUP, LR, EMA = 20, 4, 1e-3, 0.9


@pytest.fixture
def task(tiny_config, monkeypatch):
    config = OmegaConf.merge(
        tiny_config,
        {"model": {"ema_rate": EMA}, "optim": {"lr": LR, "warmup_steps": WARMUP, "weight_decay": 0.0, "beta1": 0.9}},
        {"optim": {"eps": 1e-8}},
    )
    torch.manual_seed(0)
    made = NoisePredictionTask(config, total_steps=STEPS)
    monkeypatch.setattr(made, "log", lambda *a, **k: None)
    return made


def test_loss_is_the_mean_square_of_the_noise_that_is_missed(task, monkeypatch):
    seen = {}

    def oracle(x, t):
        seen["x"], seen["t"] = x, t
        return torch.zeros_like(x)

    monkeypatch.setattr(task, "model", torch.nn.Module())
    task.model.forward = oracle
    x_0 = torch.rand(64, 1, 8, 8) * 2 - 1
    loss = float(task.training_step([x_0], 0))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[seen["t"]][:, None, None, None]
    noise = (seen["x"] - abar.sqrt() * x_0) / (1 - abar).sqrt()  # of x_t = √ᾱ x_0 + √(1−ᾱ) ε
    assert loss == pytest.approx(float(noise.square().mean()), rel=RECOVERY_TOLERANCE)
    late = noise[seen["t"] > 300]
    assert late.numel() > 1500
    assert abs(float(late.mean())) < NORMAL_TOLERANCE and abs(float(late.var()) - 1) < NORMAL_TOLERANCE
    assert seen["t"].min() < 200 and seen["t"].max() > 800 and len(seen["t"].unique()) > 32
    # Planted: ᾱ of another image's timestep, and noise of twice the variance.
    early = (seen["x"] - abar.roll(1, 0).sqrt() * x_0) / (1 - abar.roll(1, 0)).sqrt()
    assert loss != pytest.approx(float(early.square().mean()), rel=RECOVERY_TOLERANCE)
    assert abs(float((late * 2**0.5).var()) - 1) > NORMAL_TOLERANCE


def test_perfect_prediction_costs_nothing(task):
    x_0 = torch.rand(4, 1, 8, 8)

    class Perfect(torch.nn.Module):
        def forward(self, x, t):
            abar = task.alphas_cumprod[t][:, None, None, None]
            return (x - abar.sqrt() * x_0) / (1 - abar).sqrt()

    task.model = Perfect()
    assert float(task.training_step([x_0], 0)) < PERFECT_LOSS
    assert float(task.training_step([x_0 - 0.1], 0)) > PERFECT_LOSS  # planted: another image was noised


def test_ema_follows_the_weights(task):
    first = {k: v.clone() for k, v in task.model.state_dict().items()}
    task.on_train_batch_end(None, None, 0)  # the first update copies
    for p in task.model.parameters():
        p.data.add_(1.0)
    task.on_train_batch_end(None, None, 1)
    for name, value in task.ema.module.state_dict().items():
        torch.testing.assert_close(value, first[name] + (1 - EMA), rtol=0, atol=EMA_TOLERANCE)
    assert 1 - EMA > EMA_TOLERANCE  # planted: an average that does not move


def test_learning_rate_warms_up_and_decays_as_a_cosine(task):
    made = task.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:WARMUP] == pytest.approx([LR * (i + 1) / WARMUP for i in range(WARMUP)])
    assert rates[WARMUP] == pytest.approx(LR)
    middle = (STEPS - WARMUP) // 2
    assert rates[WARMUP + middle] == pytest.approx(LR * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert made["lr_scheduler"]["interval"] == "step"


def test_only_the_model_is_optimised(task):
    (group,) = task.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in task.model.parameters()}


@pytest.mark.parametrize("size", [8, 16])
def test_digits_fill_the_range(size):
    images = load_training_images(OmegaConf.create({"dataset": "DIGITS", "image_size": size}))
    assert images.shape == (1797, 1, size, size) and images.dtype == torch.float32
    assert float(images.min()) == -1 and float(images.max()) == 1
    corners = images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert float(np.median(corners)) == -1  # background is black


def test_digits_may_have_several_equal_channels():
    grey = load_training_images(OmegaConf.create({"dataset": "DIGITS", "image_size": 8}))
    colour = load_training_images(OmegaConf.create({"dataset": "DIGITS", "image_size": 8, "channels": 3}))
    assert colour.shape == (1797, 3, 8, 8)
    assert all(torch.equal(colour[:, i : i + 1], grey) for i in range(3))


def test_labels_belong_to_their_images():
    data = OmegaConf.create({"dataset": "DIGITS", "image_size": 8})
    images, labels = load_training_images(data), load_training_labels(data)
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert sorted(labels.unique().tolist()) == list(range(10))
    means = torch.stack([images[labels == d].mean(0) for d in range(10)])

    def share_nearest_to_the_mean_of(classes):
        distances = (images[:, None] - means).flatten(2).norm(dim=2)
        return float((distances.argmin(1) == classes).float().mean())

    assert share_nearest_to_the_mean_of(labels) > 0.8
    assert share_nearest_to_the_mean_of(labels.roll(1)) < 0.2  # planted: the labels of other images
    with pytest.raises(UserError, match=r"CATS.*DIGITS"):
        load_training_labels(OmegaConf.create({"dataset": "CATS", "image_size": 8}))


def test_unknown_dataset_names_the_known():
    with pytest.raises(UserError, match=r"CATS.*DIGITS"):
        load_training_images(OmegaConf.create({"dataset": "CATS", "image_size": 8}))
