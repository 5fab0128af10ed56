"""``poodle-lightning check-data``: what a labelled data set holds, what is missing, and what is wrong."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from poodle_lightning.commands import add_config_arguments
from poodle_lightning.types import UserError

if TYPE_CHECKING:
    from poodle_lightning.commands import Build
    from poodle_lightning.data.label_checks import Finding, Survey
    from poodle_lightning.data.labelled import LabelledDataModule

NAME = "check-data"
HELP = "labelled images: counts, sizes, classes; what is missing or wrong"
_SOURCES = ("folder", "bdd100k", "cityscapes", "ade20k", "voc", "coco", "wt_sem", "synthetic")
_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The data set, by configuration or by name and folder."""
    add_config_arguments(parser)
    parser.add_argument("--source", choices=_SOURCES, help="the data set, instead of a configuration")
    parser.add_argument("--root", metavar="DIR", help="its folder, or the one above")
    parser.add_argument("--split", choices=("train", "val"), help="only this one (default: both)")
    parser.add_argument("--fast", action="store_true", help="only the list of files and the headers")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: %(default)s)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Prints a report per split; the exit code is 2 with the first finding in one line if there is one.

    Raises:
        UserError: something is wrong with the data, or the arguments contradict each other.
    """
    try:
        return _check(args, _module(args, build))
    except UserError as error:
        # the data module speaks of its own key
        raise UserError(str(error).replace("--data.root", "--root")) from error


def _check(args: argparse.Namespace, data: LabelledDataModule) -> int:
    findings: list[Finding] = []
    for split in (args.split,) if args.split else ("train", "val"):
        survey = data.survey(split, every_mask=not args.fast)
        print(text(survey))
        findings += survey.findings
    if findings:
        first = min(findings, key=lambda finding: not finding.fatal)
        more = f" (and {len(findings) - 1} more, above)" if len(findings) > 1 else ""
        raise UserError(f"{first}{more}")
    print("nothing wrong" + ("; masks were not read (--fast)" if args.fast else ""))
    return 0


def text(survey: Survey) -> str:
    """A split's counts, sizes, classes and findings, over several lines."""
    count = f"{survey.images:,} images with masks"
    if survey.published is not None:
        count += f" (published: {survey.published:,})"
    lines = [f"{survey.split}: {count}"]
    for (height, width), number in survey.sizes.most_common(5):
        lines.append(f"  {width}×{height} px: {number:,}")
    if len(survey.sizes) > 5:
        lines.append(f"  and {len(survey.sizes) - 5:,} other sizes")
    if survey.read and survey.images:
        labelled = max(1, sum(survey.pixels[:-1]))
        rows = zip(survey.classes.names, survey.pixels[:-1], survey.holding[:-1], strict=True)
        lines.append(f"  {'class':<28} {'% of labelled pixels':>20} {'% of images':>12}")
        for number, (name, pixels, images) in enumerate(rows):
            share, among = 100 * pixels / labelled, 100 * images / survey.images
            lines.append(f"  {number:>3} {name:<24} {share:>20.3f} {among:>12.1f}")
        lines.append(f"  ignored: {100 * survey.ignored:.3f} % of all pixels")
    lines += [f"  wrong: {finding.text}" for finding in survey.findings[:_SHOWN]]
    if len(survey.findings) > _SHOWN:
        lines.append(f"  and {len(survey.findings) - _SHOWN:,} more")
    return "\n".join(lines)


def _module(args: argparse.Namespace, build: Build) -> LabelledDataModule:
    from poodle_lightning.data.labelled import LabelledDataModule

    if bool(args.config) == bool(args.source):
        raise UserError("check-data: give --config FILE, or --source NAME with --root DIR")
    if args.source:
        if args.overrides:
            raise UserError(f"check-data: {args.overrides[0]} belongs to --config, not to --source")
        source: Any = args.source
        return LabelledDataModule(source, args.root, num_workers=args.workers)
    extra = [] if args.root is None else [f"--data.root={args.root}"]
    data = build(args.config, [*args.overrides, *extra])[1]
    if not isinstance(data, LabelledDataModule):
        hint = "`inspect` looks at videos, other labels are checked by the run that uses them"
        raise UserError(f"check-data: {args.config[-1]} has no images with a class per pixel; {hint}")
    data.num_workers = args.workers
    return data
