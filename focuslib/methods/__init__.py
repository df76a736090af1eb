"""The methods, by name. A new method is one file here and one entry below."""

from focuslib.methods.adaptiv import Adaptiv
from focuslib.methods.base import Dense, Method
from focuslib.methods.cmc import Cmc
from focuslib.methods.focus import Focus
from focuslib.methods.framefusion import FrameFusion
from focuslib.prefill.record import Prefill, PrefillRecord

METHODS: dict[str, type[Method]] = {method.name: method for method in (Dense, Focus, FrameFusion, Adaptiv, Cmc)}

__all__ = ["METHODS", "Adaptiv", "Cmc", "Dense", "Focus", "FrameFusion", "Method", "Prefill", "PrefillRecord"]
