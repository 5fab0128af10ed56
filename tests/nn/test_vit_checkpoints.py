"""Files as DINO, DoRA, iBOT, MAE, timm and others write them; features and attention are timm's own."""

import argparse
import copy

import pytest
import timm
import torch
from vit_twins import interpolated, split, timms_last_block

from poodle_lightning.hub import load_encoder
from poodle_lightning.nn.foreign import title
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError

DIM, HEADS = 128, 2


def network(seed, patch=8, side=4):
    """timm's, with random weights, made for ``side x side`` patches."""
    torch.manual_seed(seed)
    made = timm.models.VisionTransformer(
        img_size=side * patch,
        patch_size=patch,
        embed_dim=DIM,
        depth=2,
        num_heads=HEADS,
        num_classes=3,
        dynamic_img_size=True,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
        made.pos_embed.normal_()
    return made


def under(prefix, made):
    return {prefix + k: v for k, v in made.state_dict().items() if not k.startswith("head.")}


def centred(student, teacher, masked=None):
    """What DINO's main_dino.py saves, and DoRA's main.py; with ``masked`` what iBOT's main_ibot.py saves."""
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    loss = {"center": torch.zeros(1, 2)}
    token = {} if masked is None else {"module.backbone.masked_embed": masked}
    return {
        "student": under("module.backbone.", student) | {f"module.{k}": v for k, v in head.items()} | token,
        "teacher": under("backbone.", teacher) | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
        "fp16_scaler": {"scale": 65536.0},
        **(
            {"dino_loss": loss} if masked is None else {"ibot_loss": loss | {"center2": torch.zeros(1, 1, 2)}}
        ),
    }


def mae(student):
    decoder = {
        "mask_token": torch.ones(1, 1, 32),
        "decoder_pos_embed": torch.ones(1, 17, 32),
        "decoder_embed.weight": torch.ones(32, DIM),
        "decoder_blocks.0.norm1.weight": torch.ones(32),
        "decoder_norm.weight": torch.ones(32),
    }
    return {"model": under("", student) | decoder, "epoch": 800, "args": argparse.Namespace()}


# What the file holds for a student and a teacher, which of the two it stands for, and whose interpolation.
FORMS = {
    "timm": (lambda student, teacher: student.state_dict(), "student", "timm"),
    "backbone": (
        lambda student, teacher: {
            "state_dict": under("module.backbone.", student) | {"module.projector.0.weight": torch.ones(2, 2)}
        },
        "student",
        "timm",
    ),
    "MAE": (lambda student, teacher: mae(student), "student", "timm"),
    "MAE, encoder alone": (lambda student, teacher: {"model": under("", student)}, "student", "timm"),
    "DINO, DoRA": (centred, "teacher", "dino"),
    "iBOT": (
        lambda student, teacher: centred(student, teacher, masked=torch.ones(1, DIM)),
        "teacher",
        "dino",
    ),
}


def check(encoder, reference, size, pos_interp):
    """Features, attention, queries and keys of the loaded network against those of timm's."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(5))
    patch = encoder.patch
    grid = (size[0] // patch, size[1] // patch)
    if pos_interp == "dino" and grid != encoder.grid:
        reference = copy.deepcopy(reference)
        cells = reference.pos_embed[0, 1:].detach().double().reshape(*encoder.grid, DIM).numpy()
        moved = torch.from_numpy(interpolated(cells, grid).reshape(1, -1, DIM)).float()
        reference.pos_embed = torch.nn.Parameter(torch.cat([reference.pos_embed[:, :1].detach(), moved], 1))
        reference.patch_embed.set_input_size(size)
    normalised = (images - encoder.mean) / encoder.std
    with torch.no_grad():
        found, plain = encoder.look(images), encoder(images)
        tokens = reference.forward_features(normalised)
    attention, queries, keys = timms_last_block(reference, normalised)
    cells = tokens[:, 1:].transpose(1, 2).reshape(2, DIM, *grid)
    for features in (found, plain):
        torch.testing.assert_close(features.vector, tokens[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.last, cells, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.attention, attention, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.queries, split(queries, HEADS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.keys, split(keys, HEADS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_every_form(tmp_path, name, patch):
    make, whose, pos_interp = FORMS[name]
    networks = {"student": network(0, patch), "teacher": network(1, patch)}
    torch.save(make(**networks), tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth")
    assert type(encoder) is ViT
    assert (encoder.patch, encoder.grid, encoder.pos_interp) == (patch, (4, 4), pos_interp)
    assert encoder.mask_token is None
    for grid in ((4, 4), (5, 7), (3, 2)):
        check(encoder, networks[whose], (grid[0] * patch, grid[1] * patch), pos_interp)


@pytest.mark.parametrize("name", ["DINO, DoRA", "iBOT"])
def test_the_student_of_a_file(tmp_path, name):
    student, teacher = network(0), network(1)
    torch.save(FORMS[name][0](student, teacher), tmp_path / "w.pth")
    check(load_encoder(tmp_path / "w.pth", network="online"), student, (32, 32), "dino")
    check(load_encoder(tmp_path / "w.pth", network="teacher"), teacher, (40, 24), "dino")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch": 16, "image_size": (64, 64)}, r"'patch_embed.proj.weight' .*\(128, 3, 16, 16\), .*8, 8\)"),
        ({"patch": 8, "image_size": (48, 48)}, r"'pos_embed' .*\(1, 37, 128\), .*\(1, 17, 128\)"),
    ],
)
@pytest.mark.parametrize("name", FORMS)
def test_a_file_for_another_patch_or_grid(tmp_path, name, sizes, message):
    torch.save(FORMS[name][0](network(0), network(1)), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(tmp_path / "w.pth", ViT(**sizes, dim=DIM, heads=HEADS, depth=2))
    assert "\n" not in str(caught.value)


def masked(**kwargs):
    return ViT(8, DIM, 2, HEADS, (32, 32), mask_token=True, **kwargs)


def test_the_mask_token_of_ibots_student(tmp_path):
    """It is a part of the student, which then hides patches as iBOT's own network does."""
    student, teacher = network(0), network(1)
    token = torch.randn(1, DIM, generator=torch.Generator().manual_seed(2))
    torch.save(centred(student, teacher, masked=token), tmp_path / "w.pth")
    inferred = load_encoder(tmp_path / "w.pth", network="online")
    given = load_encoder(tmp_path / "w.pth", masked(), network="online")
    images, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    normalised = (images - inferred.mean) / inferred.std
    with torch.no_grad():
        patches = student.patch_embed(normalised).flatten(1, 2)
        patches[0, 6] = token[0]
        tokens = torch.cat([student.cls_token, patches], dim=1) + student.pos_embed
        expected = student.norm(student.blocks(tokens))[:, 0]
        for encoder in (inferred, given):
            assert torch.equal(encoder.mask_token, token)
            torch.testing.assert_close(encoder(images, mask).vector, expected, rtol=1e-5, atol=1e-5)
    check(inferred, student, (40, 24), "dino")


@pytest.mark.parametrize("network_name", ["online", "teacher"])
def test_a_network_without_a_mask_token_takes_ibots_and_one_with_it_takes_others(tmp_path, network_name):
    student, teacher = network(0), network(1)
    wanted = student if network_name == "online" else teacher
    torch.save(FORMS["iBOT"][0](student, teacher), tmp_path / "ibot.pth")
    plain = ViT(8, DIM, 2, HEADS, (32, 32), pos_interp="dino")
    check(load_encoder(tmp_path / "ibot.pth", plain, network=network_name), wanted, (40, 24), "dino")
    torch.save(FORMS["DINO, DoRA"][0](student, teacher), tmp_path / "dino.pth")
    found = load_encoder(tmp_path / "dino.pth", masked(pos_interp="dino"), network=network_name)
    check(found, wanted, (40, 24), "dino")
    assert not found.mask_token.any()


@pytest.mark.parametrize("name", ["timm", "MAE", "MAE, encoder alone"])
def test_a_mask_token_that_a_file_lacks_or_has_for_its_decoder(tmp_path, name):
    torch.save(FORMS[name][0](network(0), network(1)), tmp_path / "w.pth")
    found = load_encoder(tmp_path / "w.pth", masked())
    check(found, network(0), (32, 32), "timm")
    assert not found.mask_token.any()


def test_a_mask_token_under_its_own_name(tmp_path):
    ours = masked()
    torch.nn.init.normal_(ours.mask_token)
    torch.save(ours.state_dict(), tmp_path / "w.pth")
    assert torch.equal(load_encoder(tmp_path / "w.pth", masked()).mask_token, ours.mask_token)


def test_files_for_more_heads_in_the_last_block(tmp_path):
    """No shape tells of heads: the encoder is given, and says what it is."""
    reference = network(0)
    torch.save(FORMS["DINO, DoRA"][0](network(1), reference), tmp_path / "w.pth")
    found = load_encoder(tmp_path / "w.pth", ViT(8, DIM, 2, HEADS, (32, 32), last_heads=16))
    attention = reference.blocks[1].attn
    attention.num_heads, attention.head_dim, attention.scale = 16, DIM // 16, (DIM // 16) ** -0.5
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = reference.forward_features((images - found.mean) / found.std)
        torch.testing.assert_close(found(images).vector, expected[:, 0], rtol=1e-5, atol=1e-5)
    assert title(found) == "ViT-128x2/8, 2 heads (16 in the last block)"
