"""One thread that writes all answers, one after the other; the event loop only waits for their pieces."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator

from ..session import Piece, Pieces


class Stopping(Exception):
    """The server ends; answers that are not complete never will be."""


class AnswerJob:
    """An answer to be written. Its pieces are read in the event loop, and made in the worker's thread."""

    def __init__(self, pieces: Pieces):
        self._pieces = pieces
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._cancelled = threading.Event()

    async def read(self) -> AsyncIterator[Piece]:
        """The pieces; the last has `finish`. Raises what went wrong."""
        while True:
            await asyncio.sleep(0)  # pieces that wait come without one, and the loop must learn who has gone away
            piece = await self._made.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish is not None:
                return

    def cancel(self) -> None:
        """Nobody waits for it any more: the worker stops at the next token."""
        self._cancelled.set()

    def stop(self) -> None:
        """Cancel, and tell who waits. In the event loop's thread."""
        self.cancel()
        self._made.put_nowait(Stopping("the server is stopping"))

    def work(self) -> None:
        """Write the answer. In the worker's thread."""
        try:
            while not self._cancelled.is_set() and (piece := next(self._pieces, None)) is not None:
                if piece.text or piece.finish:
                    self._post(piece)
        except Exception as error:
            self._post(error)
        finally:
            self._pieces.close()  # a session works on nothing else before that

    def _post(self, piece: Piece | Exception) -> None:
        if not self._cancelled.is_set():  # after which the loop may have ended
            self._loop.call_soon_threadsafe(self._made.put_nowait, piece)


class Worker:
    """The thread and the queue before it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[AnswerJob | None] = queue.SimpleQueue()
        self._open: set[AnswerJob] = set()  # waiting, or being written
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def submit(self, pieces: Pieces) -> AnswerJob:
        job = AnswerJob(pieces)
        self._open.add(job)
        self._queue.put(job)
        return job

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            job.work()
            self._open.discard(job)

    def stop(self) -> None:
        """End every answer now. In the event loop's thread."""
        for job in list(self._open):
            job.stop()

    def join(self) -> None:
        """Wait until the thread has put down what it was at."""
        self._queue.put(None)
        self._thread.join()
