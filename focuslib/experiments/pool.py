"""Processes that share work."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import Thread

import torch


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that share this machine's cores, each on a GPU of its own as far as there are GPUs.

    Leaving the block early, by an exception or an interrupt, ends the workers at once.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, and CUDA forbids it
    started = context.Value("i", 0)
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, context, _begin, (threads, started))
    before = set(multiprocessing.active_children())
    try:
        with _quiet_workers():
            yield pool
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def _quiet_workers() -> Iterator[None]:
    """Have the workers that start in the block show no progress: it is shown here."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _begin(threads: int, started) -> None:
    """Set up a worker. started: a shared counter of the workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent,), daemon=True).start()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _end_with(parent: BaseProcess) -> None:
    """A worker whose parent was killed must not go on writing beside the next run's."""
    parent.join()
    os._exit(1)
