"""See what a method does to a clip: `explore(vlm, "clip.mp4", "What happens?")` opens an interactive view."""

from typing import Any

__all__ = ["default_method", "explore", "explore_trace", "tiny_examples"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from focuslib.explore import widget  # needs the extra [lab], which recording what a view shows does not

    return getattr(widget, name)
