"""Counts become cycles, bytes and energy on the accelerators of the paper."""
