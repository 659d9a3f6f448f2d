# SPDX-License-Identifier: Apache-2.0
"""Ranks that are threads of this process: the algorithms alone, for many cases in little time."""

import queue
import threading
from collections import defaultdict

from fastattn.distributed._engine import Engine, Transfer

PATIENCE = 30  # seconds after which a test gives up a rank that waits for ever


class World:
    """What the ranks of one test share."""

    def __init__(self, size):
        self.size = size
        self.messages = 0
        self.pairs = set()
        self._boxes = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def box(self, source, target, tag):
        with self._lock:
            return self._boxes[source, target, tag]

    def run(self, function):
        """Return what function(comm) returns on each rank; raise what one raises."""
        results, errors = [None] * self.size, [None] * self.size

        def call(rank):
            try:
                results[rank] = function(Threads(self, rank))
            except BaseException as error:
                errors[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        for error in errors:
            if error is not None:
                raise error
        return results


class Threads(Engine):
    def __init__(self, world, rank):
        self.rank, self.size, self.world = rank, world.size, world

    def start(self, sends, receives, tag):
        for rank, x in sends:
            self.world.box(self.rank, rank, tag).put(x.copy())
            self.world.pairs.add((self.rank, rank))
        boxes = [(self.world.box(rank, self.rank, tag), x) for rank, x in receives]
        return _Transfer(boxes)


class _Transfer(Transfer):
    def __init__(self, boxes):
        self._boxes = boxes

    def poll(self):
        return False

    def wait(self, seconds):
        for box, x in self._boxes:
            try:
                x[...] = box.get(timeout=PATIENCE if seconds is None else seconds)
            except queue.Empty:
                assert seconds is not None, "a rank waits for ever"
                return False
        self._boxes = []
        return True
