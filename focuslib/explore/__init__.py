"""See what a method does to a clip: `explore(vlm, "clip.mp4", "What happens?")` opens an interactive view."""

from typing import Any

from focuslib.errors import extra_of, needs_extra

__all__ = ["default_method", "explore", "explore_trace", "tiny_examples"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    try:
        from focuslib.explore import widget  # needs the extra [lab], which recording what a view shows does not
    except ModuleNotFoundError as error:
        if extra_of(error):
            raise needs_extra(name, "lab") from None
        raise
    return getattr(widget, name)
