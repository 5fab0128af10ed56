"""The GPU's benchmark runs on a CPU too, and what it compares is the same loss."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.gpu_step")


def test_a_tiny_run_is_written(gpu_step, tmp_path):
    words = ["--device", "cpu", "--tiny", "--h", "64", "--w", "128", "--batch", "2", "--steps", "1"]
    names = ["published, float32", "package, float32", "package, bfloat16, recompute"]
    gpu_step.main([*words, "--warmup", "1", "--rounds", "1", "--variants", *names, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_step.json").read_text())["results"]["variants"]
    assert list(found) == names
    assert found["published, float32"]["times_faster"]["median"] == 1.0
    # the commuted projector does less; what is computed again counts once
    work = {name: variant["tflop_per_pair"] for name, variant in found.items()}
    assert work["package, float32"] < work["published, float32"]
    assert work["package, bfloat16, recompute"] == work["package, float32"]


def test_without_a_gpu_it_says_so(gpu_step, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu_step.main([])
    assert "no CUDA device" in capsys.readouterr().err


def test_both_steps_have_nearly_one_dense_loss(gpu_step, monkeypatch):
    """Same weights, clips and views; the subcrops are drawn otherwise, so only the dense term is compared."""
    from benchmarks.published.step import PublishedStep
    from poodle_lightning.augment.photometric import recolour

    args = gpu_step.argparse.Namespace(tiny=True, device="cpu", batch=2)
    clip = gpu_step.make_clips((64, 128), 2, 1)[0]
    method, plain = (gpu_step.make_method(args, commute=order).train() for order in (True, False))
    plain.pooled_weight = 0.0
    with torch.no_grad():
        ours = method.losses(clip)["dense"]
        clean = clip.unit()
        flow = plain.flow(clip, clean).to_pixels()
        theirs = PublishedStep(plain, 2).loss(recolour(plain.colour, clean, clip.key), flow, clip.key)
    assert float(ours) == pytest.approx(float(theirs), rel=0.03)
    assert float(ours) > 0.05
