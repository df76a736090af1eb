"""The methods, by name. A new method is one file here and one entry below."""

from focuslib.methods.base import Dense, Method, Prefill, PrefillRecord
from focuslib.methods.focus import Focus

METHODS: dict[str, type[Method]] = {method.name: method for method in (Dense, Focus)}

__all__ = ["METHODS", "Dense", "Focus", "Method", "Prefill", "PrefillRecord"]
