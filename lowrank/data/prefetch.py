"""Compute items in threads a little ahead of their use, in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """`map(function, items)`, computed by `workers` threads at most 2·workers items ahead.

    The results and their order do not depend on `workers`; an error is raised in place of its item. Without
    workers no thread is started. Leaving the loop early cancels items that have not begun.
    """
    if workers < 1:
        yield from map(function, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="data") as pool:
        waiting = deque(pool.submit(function, item) for item in itertools.islice(items, 2 * workers))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
