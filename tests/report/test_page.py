"""The page parses, loads nothing from elsewhere, and shows only what there is."""

import base64
import json
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch

from poodle_lightning.evaluation.linear_readout import LinearHead, Readout
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.ops.geometry import Affine, Flow
from poodle_lightning.report import FeatureMaps, LabelReadout, Material, write_report
from poodle_lightning.types import ClassSet, Look, View

SIZE = (32, 64)
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects headings, addresses, captions, text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.headings, self.addresses, self.text, self.anchors = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset"):
                self.addresses.append(value)
            if name == "href":
                self.anchors.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.text.append(data)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def material():
    """Two pairs, the second frame the first moved right by 4 px; three subcrops; labels of three classes."""
    first = rand(2, 3, *SIZE)
    frames = torch.stack([first, first.roll(4, dims=-1)], dim=1)
    there = torch.tensor([4.0, 0.0]).reshape(1, 2, 1, 1).expand(2, 2, *SIZE)
    boxes = Affine.box(
        torch.tensor([[-0.9, -0.5, 0.1, 0.5], [0.0, 0.0, 0.5, 0.5], [-0.5, -0.9, 0.4, 0.0]] * 4)
    )
    view = View(rand(4, 3, *SIZE), Affine.identity(4))
    look = Look(
        frames,
        Flow.from_pixels(torch.cat([there, -there])),
        torch.ones(4, *SIZE, dtype=torch.bool),
        (view, view),
        (boxes, boxes),
        (rand(12, 3, 16, 16), rand(12, 3, 16, 16)),
    )
    labels = torch.arange(3).repeat_interleave(32 * 64 // 3 + 1)[: 32 * 64].reshape(1, *SIZE)
    confusion = Confusion(3)
    confusion.update(labels, labels)
    classes = ClassSet(("road", "sky", "<odd & new>"), {"small": ("sky",)})
    scored = Readout(confusion, classes, LinearHead(torch.zeros(2), torch.ones(2), 3), None, 1.0)
    readout = LabelReadout(scored, scored, confusion, rand(1, 3, *SIZE), labels, labels)
    maps = FeatureMaps(frames[:, 0], rand(2, 8, 4, 8), rand(2, 8, 4, 8, seed=1))
    return Material("PooDLe", 300, True, look, maps, readout)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "street" / "2026-01-02_03-04-05"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,train/loss,train/loss_dense,train/loss_pooled,val/loss,health/encoder/std,health/encoder/rankme,"
        "health/encoder/cosine,health/collapsed,perf/clips_per_second\n"
        "0,2.0,1.0,1.0,,,,,,\n"
        "1,1.5,0.7,0.8,1.75,0.1,3.5,0.97,0,12.5\n"
        "2,nan,0.7,0.8,1.25,0.1,3.5,0.97,1,13.5\n"
        "3,1.0,0.5,"
    )
    (folder / "env.json").write_text(
        json.dumps({"versions": {"torch": "9.9"}, "gpus": ["A", "B"], "git": None})
    )
    (folder / "config.yaml").write_text("data:\n  root: <videos>\n")
    lines = [
        {"stage": "index", "path": "a.mp4", "reason": "corrupt", "detail": "no frames"},
        {"stage": "train", "epoch": 0, "step": 3, "path": "b.mp4", "reason": "corrupt", "detail": "x"},
        {"stage": "epoch", "epoch": 0, "rank": 0, "requested": 40, "used": 39, "skipped": {"corrupt": 1}},
    ]
    (folder / "skipped.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "tra')
    return folder


ALL = [
    "Loss", "Health", "Frame pairs", "Motion", "Warped pairs", "Augmented views", "Subcrop pairs", "Features",
    "Linear readout", "Skipped videos", "Speed", "Environment",
]  # fmt: skip


def test_whole_page(run, material):
    path = write_report(run, material)
    assert path == run / "report" / "index.html"
    page = Page(path)
    assert page.headings == ALL
    assert page.anchors == [f"#{title.lower().replace(' ', '-')}" for title in ALL]
    text = " ".join(page.text)
    for words in (
        "street / 2026-01-02_03-04-05",
        "PooDLe",
        "300",
        "<odd & new>",
        "root: <videos>",
        "13",
        "versions.torch",
        "A, B",
    ):
        assert words in text
    assert "collapsed by step 3" in text
    assert "1 were replaced in training, of 40 asked for" in text
    # the second frame pulled onto the first leaves nothing
    assert "to 0.0 of 255" in text


def test_page_is_self_contained(run, material):
    path = write_report(run, material)
    page = Page(path)
    assert len(page.addresses) > 30
    assert {address.partition(",")[0] for address in page.addresses} == {"data:image/png;base64"}
    for address in page.addresses:
        image = cv2.imdecode(np.frombuffer(base64.b64decode(address.partition(",")[2]), np.uint8), -1)
        assert min(image.shape[:2]) > 1
    markup = path.read_text(encoding="utf-8")
    for outside in ("http://", "https://", "url(", "@import", "<script", "<link"):
        assert outside not in markup


def test_pictures_carry_the_pixels(run, material):
    path = write_report(run, material)
    wanted = (material.look.frames[0, 0] * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
    shown = [
        cv2.imdecode(np.frombuffer(base64.b64decode(address.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)
        for address in Page(path).addresses
    ]
    same = [image for image in shown if image.shape == wanted.shape and (image == wanted).all()]
    # frame pairs and features both show it; the exact warp shows it up to the part that left the frame
    assert len(same) >= 2
    assert any(
        image.shape == wanted.shape and (image[:, :60] == wanted[:, :60]).all() and (image != wanted).any()
        for image in shown
    )


def test_empty_run_has_no_sections(tmp_path):
    page = Page(write_report(tmp_path))
    assert page.headings == []
    assert page.addresses == []


def test_sections_without_data_stay_out(run, material):
    bare = Material(look=Look(material.look.frames))
    of_files = {"Loss", "Health", "Skipped videos", "Speed", "Environment"}
    assert set(Page(write_report(run, bare)).headings) == {*of_files, "Frame pairs"}
    for name in ("metrics.csv", "skipped.jsonl", "env.json", "config.yaml"):
        (run / name).unlink()
    assert Page(write_report(run, bare)).headings == ["Frame pairs"]


def test_every_section_says_what_it_shows_in_one_sentence(run, material):
    markup = write_report(run, material).read_text(encoding="utf-8")
    sentences = [part.partition("<p>")[2].partition("</p>")[0] for part in markup.split("</h2>")[1:]]
    assert len(sentences) == len(ALL)
    assert all(sentence.endswith(".") and len(sentence) > 20 for sentence in sentences)


def test_training_frames_are_not_called_held_out(run, material):
    page = Page(write_report(run, Material(held_out=False, look=Look(material.look.frames))))
    assert any("Training pairs" in words for words in page.text)


def test_written_elsewhere_on_request(run, tmp_path):
    path = write_report(run, out=tmp_path / "deep" / "page.html")
    assert path == tmp_path / "deep" / "page.html"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert not (run / "report").exists()
