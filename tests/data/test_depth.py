"""Images with depth: NYUv2's own file and folders, what a network is shown, what is refused."""

import cv2
import numpy as np
import pytest
import torch
from depth_trees import H, W, folder, module, nyu, pixels

from poodle_lightning.data.depth import DepthDataModule
from poodle_lightning.types import UserError


def test_nyu_is_read_with_its_axes_turned_back(tmp_path):
    data = module(nyu(tmp_path / "nyu"))
    assert (data.count("train"), data.count("val")) == (3, 2)
    for batch, number in zip(data.val_dataloader(), (2, 4), strict=True):
        image, depth = pixels(number)
        assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), image)
        assert np.array_equal(batch.depth[0].numpy(), depth)
        assert batch.names[0].endswith(f"nyu_depth_v2_labeled.mat:{number + 1}")


def test_folders_hold_millimetres(tmp_path):
    data = module(folder(tmp_path), source="folder", val_batch_size=2)
    (batch,) = data.val_dataloader()
    for place in range(2):
        image, depth = pixels(place)
        assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), image)
        np.testing.assert_allclose(batch.depth[place].numpy(), depth, atol=1e-3)
    assert batch.depth.dtype == torch.float32
    assert batch.to("cpu").unit().max() <= 1


def test_training_only_mirrors_and_depends_on_the_seed_alone(tmp_path):
    root = folder(tmp_path)
    seen = set()
    for seed in range(4):
        one, two = (
            list(module(root, source="folder", batch_size=2, seed=seed, num_workers=n).train_dataloader())
            for n in (0, 1 if seed == 0 else 0)
        )
        assert all(a.images.equal(b.images) and a.depth.equal(b.depth) for a, b in zip(one, two, strict=True))
        assert sorted(int(i) for batch in one for i in batch.index) == [0, 1, 2, 3]
        for batch in one:
            for place, number in enumerate(batch.index.tolist()):
                image, depth = pixels(number)
                mirrored = not np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), image)
                seen.add(mirrored)
                if mirrored:
                    image, depth = image[:, ::-1], depth[:, ::-1]
                assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), image)
                np.testing.assert_allclose(batch.depth[place].numpy(), depth, atol=1e-3)
    assert seen == {False, True}


def test_depths_are_never_mixed(tmp_path):
    data = module(folder(tmp_path), source="folder", size=(7, 9))
    for number, batch in enumerate(data.val_dataloader()):
        there = set((pixels(number)[1] * 1000).astype(np.uint16).ravel().tolist())
        assert batch.images.shape == (1, 3, 7, 9)
        assert set((batch.depth * 1000).round().int().flatten().tolist()) <= there


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such file; --data\.root is the folder with nyu_depth"):
        module(tmp_path)
    with pytest.raises(UserError, match=r"give --data\.root"):
        DepthDataModule()
    with pytest.raises(UserError, match="must be different numbers from 1 to 5"):
        module(nyu(tmp_path / "far", test=(3, 6)))
    with pytest.raises(UserError, match="image 3 is in both splits"):
        module(nyu(tmp_path / "both", train=(1, 3)))
    broken = nyu(tmp_path / "broken")
    (broken / "nyu_depth_v2_labeled.mat").write_bytes(b"not HDF5")
    with pytest.raises(UserError, match="no HDF5 file"):
        module(broken)
    with pytest.raises(UserError, match=r"train/rgb: no such folder"):
        module(tmp_path / "none", source="folder").setup("fit")


def test_depth_files_that_are_none(tmp_path):
    root = folder(tmp_path)
    path = root / "val" / "depth" / "1.png"
    cv2.imwrite(str(path), np.full((H, W), 9, np.uint8))
    with pytest.raises(UserError, match=r"1\.png: uint8 .* one channel of 16 bits"):
        list(module(root, source="folder").val_dataloader())
    cv2.imwrite(str(path), np.zeros((H, W), np.uint16))
    with pytest.raises(UserError, match="no depth was measured"):
        list(module(root, source="folder").val_dataloader())
    cv2.imwrite(str(path), np.ones((H, W + 1), np.uint16))
    with pytest.raises(UserError, match="the depth is 17×12 px"):
        list(module(root, source="folder").val_dataloader())
    path.unlink()
    with pytest.raises(UserError, match=r"1\.png: no depth file for this image"):
        module(root, source="folder").setup("fit")
