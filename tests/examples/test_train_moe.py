"""The example trains: a tiny model in FP8, on whatever there is."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_moe.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_the_loss_falls(example, capsys):
    config = example["SIZES"]["tiny"]
    run = example["train"](config, "fp8")
    losses = run["losses"]
    assert len(losses) == config.steps
    assert losses[0] == pytest.approx(np.log(256), abs=0.3)
    assert example["final_loss"](losses) < losses[0] - 1.5
    assert 1 <= run["greatest_load_over_mean"] < 8
    assert "fp8  step    0  loss" in capsys.readouterr().out


def test_the_text_adds_up(example):
    text = example["generate_text"](5000)
    sums = [s for s in text.split(". ") if " more: " in s]
    assert len(sums) > 10
    for sentence in sums:
        had, more, now = (int(word) for word in sentence.split() if word.isdigit())
        assert had + more == now
    tokens = example["batches"](example["SIZES"]["tiny"])
    assert tokens.shape == (20, 4, 33) and tokens.dtype == np.uint8
    assert (tokens < 128).all() and len(np.unique(tokens[:, :, 0])) > 10
