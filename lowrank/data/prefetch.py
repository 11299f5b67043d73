"""Work done a little ahead of its use, in threads, in order."""

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

    Same results in the same order for every `workers`; an error is raised where its item would have come. 0
    workers: no thread. Leaving the loop early cancels what has not begun.
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
