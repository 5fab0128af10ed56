"""Runs of ``poodle-lightning flow`` in the test's own process."""

import argparse
import re

from poodle_lightning.commands import flow as command


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def no_build(configs, overrides):
    raise AssertionError("not asked for")


def run(films, out, *words, build=no_build):
    args = ("--root", films, "--out", out, "--preset", "fast", "--gap", 0.2, 0.4, "--pairs-per-video", 3)
    return command.run(parse(*args, *words), build)


def numbers(text):
    """Pairs computed, pairs that were there."""
    found = re.search(r"(\d+) pairs computed .* (\d+) were there", text)
    return int(found[1]), int(found[2])
