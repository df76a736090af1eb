"""Let `import torchvision` succeed where its compiled operators are missing.

A CPU build of torch next to a CUDA build of torchvision (a common outcome of installing from two
indexes) leaves the operators `torchvision::nms` and `torchvision::qnms` undefined; the import then fails and
takes every VLM class of transformers with it. Declaring the two schemas is enough, since nothing
here calls them. A matching torchvision is left alone.
"""

import ctypes
import importlib.util
import pathlib
import sys
from importlib.abc import MetaPathFinder

_library = None  # the fragment must stay referenced: its schemas vanish with it


class _BeforeTorchvision(MetaPathFinder):
    """Declares the operators just before the first import of torchvision.

    To see whether they are missing takes torch, whose import is a second that `focus --help` need not wait for.
    """

    def find_spec(self, fullname, path=None, target=None) -> None:
        if fullname == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_before_import() -> None:
    """Declare the operators, if they are missing, as soon as anything looks for torchvision."""
    sys.meta_path.insert(0, _BeforeTorchvision())


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # no torchvision at all: nothing to fix
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
    for path in sorted(folder.glob("_C*")):
        try:
            ctypes.CDLL(str(path))
            return True
        except OSError:
            continue
    return False


def declare_missing_operators() -> None:
    """Declare the two operator schemas that `import torchvision` needs, if its own library cannot load."""
    global _library
    import torch  # its libraries must be loaded before torchvision's can be

    if _library is not None or _compiled_operators_load():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
