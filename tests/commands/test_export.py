import pytest
import torch
import torchvision
from tiny_models import tiny_recipe

from poodle_lightning import cli, from_pretrained
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run whose only checkpoint is that of an untrained method."""
    torch.manual_seed(0)
    encoder = ResNet(depth=18)
    decoder = SDM(encoder.channels, dims=16, hidden=8)
    method = PooDLe(encoder, decoder, hidden=8, out=4, recipe=tiny_recipe())
    content = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(content)
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    torch.save(content, folder / "checkpoints/last.ckpt")
    return folder, method


def test_the_encoder_comes_back_bit_by_bit(run_folder, tmp_path, capsys):
    folder, method = run_folder
    images = torch.rand(1, 3, 64, 64)
    method.eval()
    assert cli.main(["export", str(folder)]) == 0
    assert str(folder / "export") in capsys.readouterr().out
    encoder = from_pretrained(folder / "export")
    assert isinstance(encoder, ResNet)
    assert torch.equal(encoder(images).last, method.online.encoder(images).last)
    assert cli.main(["export", str(folder), "--with-decoder", "--out", str(tmp_path / "both")]) == 0
    both = from_pretrained(tmp_path / "both")
    assert isinstance(both, DecodedEncoder)
    assert torch.equal(both(images).last, method.backbone().eval()(images).last)


def test_torchvision_loads_all_but_fc(run_folder, tmp_path):
    folder, method = run_folder
    path = tmp_path / "resnet18.pth"
    words = ["--format", "torchvision", "--out", str(path)]
    assert cli.main(["export", str(folder / "checkpoints/last.ckpt"), *words]) == 0
    net = torchvision.models.resnet18()
    report = net.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert sorted(report.missing_keys) == ["fc.bias", "fc.weight"]
    assert report.unexpected_keys == []
    assert torch.equal(
        net.layer4[1].conv2.weight, method.online.encoder.state_dict()["layer4.1.conv2.weight"]
    )


def test_what_cannot_be_exported_is_one_line(run_folder, tmp_path, capsys):
    folder, _ = run_folder
    assert cli.main(["export", str(tmp_path / "no.ckpt")]) == 2
    assert cli.main(["export", str(folder), "--with-decoder", "--format", "torchvision"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
