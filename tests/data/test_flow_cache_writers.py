"""Several processes at one file of the flow cache: whoever reads sees the old file or the new one."""

import multiprocessing
import os
import time
import warnings

import numpy as np

from poodle_lightning.data.flow_cache import FlowCache
from poodle_lightning.data.order import single_thread

VIDEO, EST = "0123abcd", "DIS medium"


def write_many(folder, seed, count):
    single_thread(0)  # as in every worker: OpenCV's threads do not survive a fork
    os.fsync = lambda descriptor: None  # in this process alone: a busy disk takes seconds for each
    cache = FlowCache(folder, EST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(count):
            cache.put(VIDEO, float(k % 4), k % 4 + 0.5, np.full((2, 2, 24, 24), 8.0 * (k % 4), np.float32))


def write_until(done, folder, seed):
    while not done.is_set():
        write_many(folder, seed, 4)


def test_two_writers_and_a_reader_never_see_a_torn_file(tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.Event()
    writers = [context.Process(target=write_until, args=(done, tmp_path, seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    try:
        cache, seen = FlowCache(tmp_path, EST), 0
        while seen < 200:
            assert all(writer.is_alive() for writer in writers)
            time.sleep(0.001)  # one that never waits can keep the writers off a busy machine's processors
            for k in range(4):
                flow = cache.get(VIDEO, float(k), k + 0.5)
                if flow is not None:
                    assert (flow == 8.0 * k).all()
                    seen += 1
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert cache.lacking(VIDEO, [(float(k), k + 0.5) for k in range(4)]) == []
    assert len(list(tmp_path.rglob("*.part"))) == 0


def test_once_a_pair_is_there_it_never_goes_missing(tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.Event()
    writer = context.Process(target=write_until, args=(done, tmp_path, 1))
    writer.start()
    try:
        cache = FlowCache(tmp_path, EST)
        while cache.get(VIDEO, 0.0, 0.5) is None:
            assert writer.is_alive()
        assert all(cache.get(VIDEO, 0.0, 0.5) is not None for _ in range(1500))
    finally:
        done.set()
        writer.join()
    assert writer.exitcode == 0


def test_a_reader_that_has_opened_a_file_keeps_it_whole(tmp_path):
    """A new file takes the old one's place: nothing is written into a file that somebody may be reading."""
    cache = FlowCache(tmp_path, EST)
    cache.put(VIDEO, 0.0, 0.5, np.zeros((2, 2, 16, 20), np.float32))
    before = cache.path(VIDEO).read_bytes()
    with cache.path(VIDEO).open("rb") as file:
        cache.put(VIDEO, 1.0, 1.5, np.ones((2, 2, 16, 20), np.float32))
        assert file.read() == before
    assert cache.path(VIDEO).read_bytes() != before
