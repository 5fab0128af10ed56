"""Small videos in the layout of UCF101."""

import av
import numpy as np

from poodle_lightning.data.actions import ActionDataModule, ClipView

VIEW = ClipView(frames=4, fps=8.0, size=16, resize=20)
NAMES = ("Dive", "Jump", "Swim")


def video(path, level, count=12):
    """Grey that is ``level`` everywhere, 8 frames per second, MPEG-4 in AVI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for _ in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ucf(root, train=2, test=1, count=12):
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    lines = {"trainlist01.txt": [], "testlist01.txt": []}
    for label, name in enumerate(NAMES):
        for number in range(train + test):
            path = f"{name}/v_{name}_g{number:02d}_c01.avi"
            video(root / "UCF-101" / path, 60 + 60 * label, count)
            if number < train:
                lines["trainlist01.txt"].append(f"{path} {label + 1}")
            else:
                lines["testlist01.txt"].append(path)
    for file, content in lines.items():
        (lists / file).write_text("\n".join(content) + "\n")
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(NAMES, 1)))
    return root


def module(root, **kwargs):
    settings = {"view": VIEW, "num_workers": 0, "batch_size": 3, "test_clips": 3, **kwargs}
    return ActionDataModule(str(root), **settings)
