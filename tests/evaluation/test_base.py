"""What evaluations share: the rate of every group of parameters."""

import lightning as L
import pytest
import torch
from few_labels import FewLabels
from tiny_models import tiny_encoder
from torch.optim import SGD
from two_readouts import OFF

from poodle_lightning.evaluation.base import Evaluation
from poodle_lightning.evaluation.segmentation import Segmentation
from poodle_lightning.nn.head_optim import HeadRecipe
from poodle_lightning.nn.seg_heads import LinearHead
from poodle_lightning.nn.vit import ViT


class Toy(Evaluation):
    """Two weights whose gradients are 1."""

    trains = True

    def __init__(self, given=None):
        super().__init__(tiny_encoder(), classes=4)
        self.given = given
        self.slow, self.plain = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))

    def training_step(self, batch, batch_idx):
        return self.slow + self.plain

    def configure_optimizers(self):
        return SGD([{"params": [self.slow], "lr_scale": 0.25}, {"params": [self.plain]}], lr=0.5)

    def rate(self):
        return None if self.given is None else self.given[self.global_step]


@pytest.mark.parametrize(
    ("given", "slow", "plain"), [(None, -1.0, -1.0), ((0.1, 0.3), -0.1, -0.4)], ids=["own", "scheduled"]
)
def test_a_step_has_the_rate_times_the_factor_of_the_group(given, slow, plain):
    toy = Toy(given)
    L.Trainer(max_steps=2, limit_val_batches=0, **OFF).fit(toy, datamodule=FewLabels())
    assert (float(toy.slow), float(toy.plain)) == pytest.approx((slow, plain))


def test_layer_decay_reaches_the_optimiser():
    torch.manual_seed(0)
    recipe = HeadRecipe(lr=0.02, layer_decay=0.5, decay="constant")
    encoder = ViT(patch=8, dim=16, depth=2, heads=2, image_size=(16, 16))
    readout = Segmentation(encoder, LinearHead(), frozen=False, recipe=recipe)
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, **OFF)
    rates = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            for group in trainer.optimizers[0].param_groups:
                rates.update(dict.fromkeys(map(id, group["params"]), group["lr"]))

    trainer.callbacks.append(Watch())
    trainer.fit(readout, datamodule=FewLabels())
    named = {name: rates[id(value)] for name, value in readout.named_parameters() if id(value) in rates}
    assert named["head.conv_seg.weight"] == 0.02
    assert named["encoder.blocks.1.attn.qkv.weight"] == pytest.approx(0.02 * 0.5)
    assert named["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.02 * 0.25)
    assert named["encoder.pos_embed"] == pytest.approx(0.02 * 0.125)
