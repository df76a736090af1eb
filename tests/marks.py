"""Marks of tests that need what not every machine has."""

import os
import shutil

import pytest

needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
