"""Tensor code compiled where that pays: as it is written for few small tensors, and where there is no working compiler.

On a CPU a function is compiled ahead of time and kept on disk, so that a later process has it in milliseconds, without
loading the compiler. On a GPU torch.compile compiles it, and keeps what it makes in its own cache.
"""

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from focuslib.files import digest, write_bytes
from focuslib.paths import cache_folder

# From this size on, a call is worth compiling for by itself. Half a million entries is a tenth of a short video in a
# model of 7 billion parameters.
LEAST_ENTRIES = 1 << 19

# Smaller calls are worth it once a process has spent some seconds on them: an entry takes about 7 ns as it is written.
# Compiling takes longer, but later processes have it for nothing.
PATIENCE = 1 << 29

# On a GPU, one graph for each number of candidates, vector size and dtype that a process meets, each of them for any
# number of tokens and channels. Beyond this many, new ones run as they are written.
_MOST_GRAPHS = 64

_broken = False
_patient = True


def _entries(*arguments: Tensor) -> int:
    """Entries of the first argument."""
    return arguments[0].numel()


@dataclass
class _Graph:
    """What is made for some dtypes and fixed sizes. patience: entries until it is compiled; run: None until then."""

    file: Path
    patience: int
    run: Callable[..., Any] | None = None


class Compiled:
    """A function of tensors that gives the same with and without a compiler, compiled when it is worth it.

    Sizes may change from call to call without compiling anew, but for those that are fixed.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *sizes: str,
        work: Callable[..., int] = _entries,
        one_thread: bool = False,
    ):
        """sizes: for each argument the names of its dimensions, a name of its own, or "=" if it is fixed.

        work: how many entries some arguments are worth. one_thread: on a CPU, whatever the number of threads, for small
        inputs and for sums by index, that then keep their order.
        """
        self.function = function
        self.sizes = [dimensions.split() for dimensions in sizes]
        self.work = work
        self.one_thread = one_thread
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, *arguments: Tensor) -> Any:
        return (self.ready(*arguments) or self.function)(*arguments)

    def ready(self, *arguments: Tensor) -> Callable[..., Any] | None:
        """The function as it is compiled for such arguments; None where they are better run as it is written."""
        work = self.work(*arguments)
        if _broken or not work:
            return None
        if arguments[0].device.type != "cpu":
            return self._on_gpu if work >= LEAST_ENTRIES else None
        fixed, lengths = [], {}
        for argument, names in zip(arguments, self.sizes, strict=True):
            for name, size in zip(names, argument.shape, strict=True):
                if name == "=":
                    fixed.append(size)
                elif size < 2:  # a graph for any size is one for sizes from 2
                    return None
                elif lengths.setdefault(name, size) != size:  # a graph does not ask
                    raise ValueError(f"{self.function.__name__}: {name} is {lengths[name]} and {size}")
        key = (*fixed, *(argument.dtype for argument in arguments))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._known(key)
        if graph.run is None:
            graph.patience -= work
            if work >= LEAST_ENTRIES or not _patient:
                self._compile(graph, arguments)
            elif graph.patience < 0:
                self._compile(graph, arguments, wait=False)
        return graph.run

    def _known(self, key: Any) -> _Graph:
        """A graph that is read from disk if an earlier process left it there."""
        file = _folder() / f"{digest([self.function.__name__, _environment(self.function), key])}.so"
        return _Graph(file, PATIENCE, _load(file))

    def _compile(self, graph: _Graph, arguments: tuple[Tensor, ...], wait: bool = True) -> None:
        """Compile a graph, or wait for another process that does; not to wait: go on as before, and look later."""
        try:
            with FileLock(graph.file.with_suffix(".lock"), timeout=-1 if wait else 0):
                graph.run = _load(graph.file)
                if graph.run is None:
                    self._write(graph.file, arguments)
                    graph.run = _load(graph.file)
                if graph.run is None:
                    raise RuntimeError(f"{graph.file} cannot be loaded")
        except Timeout:
            graph.patience = PATIENCE // 16
        except Exception as error:  # whatever torch, in any version, and the C++ compiler raise
            _give_up(error)

    def _write(self, file: Path, arguments: tuple[Tensor, ...]) -> None:
        """Compile for arguments of these dtypes and fixed sizes, and any others. Loading the compiler takes seconds."""
        _announce(self.function)
        from focuslib.kernels.ahead import shared_library

        # whole: to load half a library is to crash
        write_bytes(file, shared_library(self.function, arguments, self.sizes, self.one_thread))

    @cached_property
    def _on_gpu(self) -> Callable[..., Any]:
        """The function as torch.compile makes it."""
        _announce(self.function)
        from torch._dynamo.exc import TorchDynamoException  # also what the Triton compiler reports

        compiled = torch.compile(self.function, dynamic=True)

        def run(*arguments: Tensor) -> Any:
            for argument, names in zip(arguments, self.sizes, strict=True):
                for dimension in (number for number, name in enumerate(names) if name == "="):
                    torch._dynamo.mark_static(argument, dimension)
            try:
                with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, accumulated_recompile_limit=_MOST_GRAPHS):
                    return compiled(*arguments)
            except TorchDynamoException as error:
                _give_up(error)
                return self.function(*arguments)

        return run


def _load(file: Path) -> Callable[..., Any] | None:
    """What an earlier call, or process, has compiled, if any has and it can be loaded here.

    torch's public way takes a second of imports, and unpacks a file that a killed process leaves behind.
    """
    if not file.exists():
        return None
    native: Any = torch._C  # whose types do not tell all it has
    try:
        call = native._aoti.AOTIModelContainerRunnerCpu(str(file), 1).run
    except (RuntimeError, AttributeError, TypeError):  # the last two: of a torch that has it in another place
        return None

    def run(*arguments: Tensor) -> Any:
        # a graph is of contiguous arguments, and does not ask
        results = call([argument.contiguous() for argument in arguments])
        return results if len(results) > 1 else results[0]

    return run


@cache
def _folder() -> Path:
    """Where compiled functions are kept: with the other caches; for this process alone where that cannot be written."""
    folder = cache_folder("compiled")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(mkdtemp(prefix="focus-"))


@cache
def _environment(function: Callable[..., Any]) -> list[str]:
    """What the code made of a function hangs on, its arguments aside: its source, torch, and the processor."""
    files = [Path(str(sys.modules[module].__file__)) for module in (function.__module__, __name__)]
    files.append(files[-1].with_name("ahead.py"))  # which takes seconds to import
    return [*(str(file.read_bytes()) for file in files), torch.__version__, platform.machine(), *_instructions()]


def _instructions() -> list[str]:
    """The instructions that the processor has, where the system tells; code is compiled for all of them."""
    known = [torch.backends.cpu.get_cpu_capability(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return known
    return [*known, *[line for line in lines if line.startswith(("flags", "Features"))][:1]]


@lru_cache
@torch.inference_mode(False)  # autograd takes it too
def scalar(value: float, device: torch.device) -> Tensor:
    """A number as a compiled function takes it, [] float32: infinite if it is beyond that. Not to be overwritten."""
    return torch.tensor(value, dtype=torch.float64, device=device).float()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything as it is written, for comparison."""
    global _broken
    before, _broken = _broken, True
    try:
        yield
    finally:
        _broken = before


@contextmanager
def at_once() -> Iterator[None]:
    """Compile whatever the size of a call, as a process that runs for long does sooner or later: for measuring."""
    global _patient
    before, _patient = _patient, False
    try:
        yield
    finally:
        _patient = before


def _announce(function: Callable[..., Any]) -> None:
    """Say why a call takes longer."""
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    print(f"focuslib: compiling {name} (some ten seconds on first use, then kept on disk)", file=sys.stderr)


def _give_up(error: Exception) -> None:
    """Run without a compiler from now on, and say so once."""
    global _broken
    _broken = True
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    warnings.warn(
        f"torch cannot compile here ({reason}); large inputs run uncompiled, several times slower and with more "
        "memory. On a CPU it needs a C++ compiler (g++, clang++ or MSVC), on a GPU Triton.",
        stacklevel=4,
    )
