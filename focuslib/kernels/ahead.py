"""Compile a function of tensors to a shared library, ahead of time: what torch is told, and spared, for it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, simplefilter
from zipfile import ZipFile

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, cpp_builder, cpu_vec_isa, list_options
from torch.export import Dim, export

_OPTIONS = {
    "cpp.dynamic_threads": True,  # one graph for any number of threads
    "assert_indirect_indexing": False,  # the rows that are gathered were made by `candidate_rows`
    "aot_inductor.precompile_headers": False,  # which pays from the third kernel on only
}
_ONE_THREAD = {"cpp.dynamic_threads": False, "cpp.threads": 1}
# torch tries out, for seconds, whether the compiler knows the processor's instructions; nearly every one does
_TRUSTING = {"cpp.vec_isa_ok": True}


class _Function(torch.nn.Module):
    """A function as what torch.export takes."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


def shared_library(
    function: Callable[..., Any], arguments: Sequence[Tensor], names: Sequence[Sequence[str]], one_thread: bool
) -> bytes:
    """The library of a function on the CPU, for arguments of these dtypes, and of these sizes where they are fixed.

    names: of the dimensions of each argument; "=" of one that is fixed. one_thread: whatever the number of threads.
    Raises whatever torch, in any version, and the C++ compiler raise.
    """
    free = sorted({name for several in names for name in several} - {"="})
    lengths = {name: 133 + 4 * number for number, name in enumerate(free)}  # any that are not alike
    symbols = {name: Dim(name, min=2, max=1 << 30) for name in free}
    examples, dynamic = [], []
    for argument, several in zip(arguments, names, strict=True):
        sizes = [lengths.get(name, size) for name, size in zip(several, argument.shape, strict=True)]
        examples.append(torch.zeros(sizes, dtype=argument.dtype, device="cpu"))
        dynamic.append({place: symbols[name] for place, name in enumerate(several) if name in symbols})
    with catch_warnings(), TemporaryDirectory() as folder, _plain_instructions() as forget, _side_by_side():
        simplefilter("ignore", FutureWarning)  # torch's own of itself
        program = export(_Function(function), tuple(examples), dynamic_shapes=(tuple(dynamic),))
        package = Path(folder) / "package.pt2"
        known = list_options()  # of this torch
        options = _OPTIONS | (_ONE_THREAD if one_thread else {})
        trusting, careful = ({k: v for k, v in o.items() if k in known} for o in (_TRUSTING, options))
        try:
            aoti_compile_and_package(program, package_path=str(package), inductor_configs=careful | trusting)
        except RuntimeError:  # an old compiler, say
            forget()
            aoti_compile_and_package(program, package_path=str(package), inductor_configs=careful)
        with ZipFile(package) as archive:
            (library,) = (name for name in archive.namelist() if name.endswith(".so"))
            return archive.read(library)


@contextmanager
def _plain_instructions() -> Iterator[Callable[[], None]]:
    """Compile without a new processor's instructions for matrices and dot products, that nothing here is made of.

    torch tries out each, which takes seconds. Yields what makes it forget which it has found.
    """
    known = getattr(cpu_vec_isa, "x86_isa_checker", list)  # of this torch
    forget = cpu_vec_isa.valid_vec_isa_list.cache_clear
    cpu_vec_isa.x86_isa_checker = lambda: [name for name in known() if name in ("avx2", "avx512")]
    forget()
    try:
        yield forget
    finally:
        cpu_vec_isa.x86_isa_checker = known
        forget()


@contextmanager
def _side_by_side() -> Iterator[None]:
    """Compile both files of a graph at the same time: torch calls the compiler for one after the other, for seconds."""
    builder: Any = cpp_builder.CppBuilder
    build = builder.build
    begun: list[Future] = []

    def at_once(self) -> None:
        if self.get_target_file_path().endswith(".wrapper.o"):  # which comes first, and is named so in this torch
            begun.append(pool.submit(build, self))
            return
        wrapper = begun.pop() if begun else None
        build(self)
        if wrapper is not None:
            wrapper.result()

    builder.build = at_once
    try:
        with ThreadPoolExecutor(1) as pool:
            yield
    finally:
        builder.build = build
