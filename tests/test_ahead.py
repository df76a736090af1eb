"""What torch is told while it compiles ahead of time: two files at once, and nothing left behind."""

from threading import Event

import pytest
from torch._inductor import cpp_builder, cpu_vec_isa

from focuslib.kernels import ahead


class Builder:
    """torch's, as far as it is used: one file that is compiled."""

    def __init__(self, file, work=lambda: None):
        self.file = file
        self.work = work

    def get_target_file_path(self):
        return self.file

    def build(self):
        self.work()


def test_a_wrapper_is_compiled_beside_its_kernel(monkeypatch):
    monkeypatch.setattr(cpp_builder, "CppBuilder", Builder)
    kernel_runs, done = Event(), []

    def wrapper():
        assert kernel_runs.wait(60)
        done.append("wrapper")

    with ahead._side_by_side():
        Builder("graph.wrapper.o", wrapper).build()
        Builder("graph.kernel.o", kernel_runs.set).build()
        assert done == ["wrapper"]  # before it is linked
        Builder("graph.so", lambda: done.append("library")).build()
    assert done == ["wrapper", "library"]


def test_a_file_that_does_not_compile_is_reported_and_tried_anew(monkeypatch):
    monkeypatch.setattr(cpp_builder, "CppBuilder", Builder)

    def fail():
        raise RuntimeError("unknown instruction")

    build = Builder.build
    with ahead._side_by_side():
        for wrapper, kernel in ((fail, lambda: None), (lambda: None, fail), (fail, fail)):
            Builder("graph.wrapper.o", wrapper).build()
            with pytest.raises(RuntimeError, match="unknown instruction"):
                Builder("graph.kernel.o", kernel).build()
        Builder("graph.wrapper.o").build()  # as careful as it can be: what failed before is forgotten
        Builder("graph.kernel.o").build()
    assert Builder.build is build


def test_torch_is_left_as_it_was():
    before = cpp_builder.CppBuilder.build, cpu_vec_isa.x86_isa_checker
    with pytest.raises(ValueError, match="stop"), ahead._side_by_side(), ahead._plain_instructions():
        assert (cpp_builder.CppBuilder.build, cpu_vec_isa.x86_isa_checker) != before
        raise ValueError("stop")
    assert (cpp_builder.CppBuilder.build, cpu_vec_isa.x86_isa_checker) == before
