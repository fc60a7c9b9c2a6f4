"""A bounded pool of threads that works through numbered blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from typing import Final

from shelora.errors import InternalFault, InvalidConfiguration

MAX_THREADS: Final = 256
_CHUNK_BLOCKS: Final = 16


class BlockPool:
    """Runs work over ranges of blocks on its own threads; the HE library releases the GIL, so they scale.

    Raises:
        InvalidConfiguration: `threads` is not between 1 and `MAX_THREADS`.
    """

    def __init__(self, threads: int) -> None:
        """Start with no thread running; they start on first use.

        Args:
            threads: how many threads at most.
        """
        if not 1 <= threads <= MAX_THREADS:
            raise InvalidConfiguration(
                f"HE threads: expected 1 to {MAX_THREADS}, got {threads}",
                hint="use the number of cores left over from training",
            )
        self.threads = threads
        self._closed = False
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="shelora-he")

    def run(self, work: Callable[[int, int], None], blocks: int, progress: Callable[[int], None] | None = None) -> None:
        """Do all blocks and return when none is being worked on any more, also after an error.

        Args:
            work: called with (first, end) block numbers, from several threads at once.
            blocks: how many blocks there are.
            progress: called from this thread with the number of blocks done so far.

        Raises:
            InternalFault: the pool is closed.
            SheLoraError: whatever the work or the callback raises first; ranges not yet started are skipped.
        """
        if self._closed:
            raise InternalFault("HE thread pool: expected an open one, got a closed one", hint="make a new object")
        step = max(1, min(_CHUNK_BLOCKS, -(-blocks // self.threads)))
        sizes: dict[Future[None], int] = {}
        stop = threading.Event()

        def guarded(first: int, end: int) -> None:
            if stop.is_set():
                return
            try:
                work(first, end)
            except BaseException:
                stop.set()
                raise

        try:
            for first in range(0, blocks, step):
                end = min(first + step, blocks)
                sizes[self._executor.submit(guarded, first, end)] = end - first
            done = 0
            for future in as_completed(sizes):
                future.result()
                done += sizes[future]
                if progress is not None:
                    progress(done)
        finally:
            stop.set()
            for future in sizes:
                future.cancel()
            wait(sizes)

    def close(self) -> None:
        """Stop the threads; work already started is finished first. May be called again."""
        self._closed = True
        self._executor.shutdown(wait=True)
