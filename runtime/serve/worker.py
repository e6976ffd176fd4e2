"""One thread that generates all answers, one after the other; the event loop only waits for their pieces."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator

from ..session import Piece, Pieces


class Stopping(Exception):
    """The server is stopping; unfinished answers will not be completed."""


class AnswerJob:
    """An answer to generate. Its pieces are produced in the worker's thread and read in the event loop."""

    def __init__(self, pieces: Pieces):
        self._pieces = pieces
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._cancelled = threading.Event()

    async def read(self) -> AsyncIterator[Piece]:
        """The pieces; the last has `finish`. Raises the generation's error."""
        while True:
            await asyncio.sleep(0)  # queued pieces come without waiting; this lets the loop notice disconnected clients
            piece = await self._made.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish is not None:
                return

    def cancel(self) -> None:
        """Stop the worker at the next token, because nobody is waiting any more."""
        self._cancelled.set()

    def stop(self) -> None:
        """Cancel and notify the reader. Called in the event loop's thread."""
        self.cancel()
        self._made.put_nowait(Stopping("the server is stopping"))

    def work(self) -> None:
        """Generate the answer. Called in the worker's thread."""
        try:
            while not self._cancelled.is_set() and (piece := next(self._pieces, None)) is not None:
                if piece.text or piece.finish:
                    self._post(piece)
        except Exception as error:
            self._post(error)
        finally:
            self._pieces.close()  # the session accepts no other request before that

    def _post(self, piece: Piece | Exception) -> None:
        if not self._cancelled.is_set():  # after a cancellation the loop may be gone
            self._loop.call_soon_threadsafe(self._made.put_nowait, piece)


class Worker:
    """The thread and its queue."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[AnswerJob | None] = queue.SimpleQueue()
        self._open: set[AnswerJob] = set()  # queued or running
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
        """Cancel all answers now. Called in the event loop's thread."""
        for job in list(self._open):
            job.stop()

    def join(self) -> None:
        """Wait until the thread has stopped."""
        self._queue.put(None)
        self._thread.join()
