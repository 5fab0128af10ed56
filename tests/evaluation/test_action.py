"""Action recognition: averaged frames and clips by hand, the warm-up, bad videos, the command."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from action_trees import NAMES, module, ucf
from tiny_models import tiny_encoder
from torch.nn import functional

from poodle_lightning import cli, save_pretrained
from poodle_lightning.cli import build
from poodle_lightning.evaluation.action import ActionFineTune, ActionRecipe, unread_last
from poodle_lightning.evaluation.metrics import Accuracy
from poodle_lightning.types import UserError

OFF = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ucf(tmp_path_factory.mktemp("ucf"))


def model(warmup=1, **kwargs):
    torch.manual_seed(0)
    recipe = ActionRecipe(lr=1e-2, warmup_epochs=warmup, milestones=(2,))
    return ActionFineTune(tiny_encoder(), recipe=recipe, **{"dropout": 0.0, **kwargs})


def test_logits_are_of_the_mean_of_the_frames_vectors():
    module = model(classes=3, frames_at_once=5).eval()
    clips = torch.randint(0, 255, (2, 4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        found = module(clips)
        for place in range(2):
            vectors = [module.encoder(frame[None].float() / 255).vector[0] for frame in clips[place]]
            mean = sum(vector.double() for vector in vectors) / 4
            expected = module.head.weight.double() @ mean + module.head.bias.double()
            torch.testing.assert_close(found[place].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_rate_falls_behind_the_warm_up():
    recipe = ActionRecipe()
    rates = [recipe.rate(epoch) for epoch in range(21)]
    assert rates == pytest.approx([1e-4] * 11 + [3e-5] * 4 + [9e-6] * 4 + [2.7e-6] * 2)


def test_in_the_warm_up_only_the_layer_learns(root):
    tested = model()
    before = {name: value.clone() for name, value in tested.encoder.named_parameters()}

    class Watch(L.Callback):
        moments = ()

        def on_train_epoch_end(self, trainer, module):
            same = [value.equal(before[name]) for name, value in module.encoder.named_parameters()]
            self.moments += ((trainer.current_epoch, all(same), int(steps(trainer))),)

    def steps(trainer):
        state = trainer.optimizers[0].state[trainer.lightning_module.head.weight]
        return state["step"]

    watch = Watch()
    trainer = L.Trainer(max_epochs=2, limit_val_batches=0, callbacks=[watch], **OFF)
    trainer.fit(tested, datamodule=module(root, clips_per_video=1))
    # the encoder rests for an epoch of two steps; then Adam begins anew
    assert watch.moments == ((0, True, 2), (1, False, 2))


def test_probabilities_of_clips_are_averaged_and_unread_videos_are_wrong(root, tmp_path):
    broken = tmp_path / "ucf"
    shutil.copytree(root, broken)
    (broken / "UCF-101/Dive/v_Dive_g02_c01.avi").write_bytes(b"RIFF")
    tested, data = model(), module(broken)
    L.Trainer(**OFF).validate(tested, datamodule=data, verbose=False)
    right = 0
    tested.eval()
    for batch in list(data.val_dataloader())[1:]:
        with torch.no_grad():
            clips = [functional.softmax(tested(batch.frames[:, k]).double(), dim=1) for k in range(3)]
        right += int((sum(clips) / 3).argmax()) == int(batch.labels)
    found = tested.scores()
    assert found.scores["top1"] == pytest.approx(right / 3)
    assert found.scores["top5"] == pytest.approx(2 / 3)  # of three classes all are among the first five
    assert found.counts["videos"] == 3
    assert found.counts["unreadable_videos_counted_as_wrong"] == 1
    assert found.per_class["top1"]["Dive"] == 0.0


def test_unread_videos_never_count():
    accuracy = Accuracy(2)
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    accuracy.update(unread_last(scores, torch.tensor([True, False])), torch.tensor([0, 0]))
    assert (accuracy.top1(), accuracy.top5()) == (0.5, 0.5)


def test_settings(root):
    trainer = L.Trainer(max_epochs=5, limit_val_batches=0, **OFF)
    with pytest.raises(UserError, match="the first 5 epochs train the layer alone"):
        trainer.fit(model(warmup=5), datamodule=module(root))
    with pytest.raises(UserError, match="dropout 1"):
        model(dropout=1.0)

    class Nothing(L.LightningDataModule):
        pass

    with pytest.raises(UserError, match="give data: ActionDataModule"):
        L.Trainer(max_epochs=2, **OFF).fit(model(), datamodule=Nothing())


def test_evaluate_finetunes_on_the_layout(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(tiny_encoder(), "encoder")
    words = [
        f"--data.root={root}", "--data.view.frames=3", "--data.view.fps=8", "--data.view.size=16",
        "--data.view.resize=20", "--data.num_workers=0", "--data.batch_size=6", "--data.test_clips=2",
        "--data.clips_per_video=2", "--model.recipe.lr=0.003", "--model.recipe.warmup_epochs=1",
        "--trainer.max_epochs=3",
        "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    config = "evaluation/vito_ucf101.yaml"
    assert cli.main(["evaluate", "--config", config, "--encoder", "encoder", *words]) == 0
    (result,) = Path("runs").rglob("result.json")
    found = json.loads(result.read_text())
    assert (found["headline"], found["counts"]["videos"], found["step"]) == ("top1", 3, 6)
    assert set(found["per_class"]["top1"]) == set(NAMES)
    (checkpoint, *_) = Path("runs").rglob("*.ckpt")
    assert ActionFineTune.load_from_checkpoint(checkpoint).head.weight.shape[0] == 3


def test_the_papers_numbers(root):
    built, data = build(
        ["evaluation/vito_ucf101.yaml"],
        [f"--data.root={root}", "--model.encoder=torchvision:resnet18:untrained"],
    )
    assert built.recipe == ActionRecipe()
    assert (built.dropout, data.batch_size, data.test_clips, data.clips_per_video) == (0.9, 32, 10, 5)
    assert (data.view.frames, data.view.fps, data.view.size) == (32, 16.0, 224)
    assert tuple(data.view.jitter) == (0.4, 0.4, 0.4, 0.2)
