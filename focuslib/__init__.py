"""Focus: streaming concentration for efficient vision-language models (HPCA 2026), and its baselines."""

from focuslib._torchvision import declare_missing_operators

declare_missing_operators()  # must run before anything imports torchvision

__version__ = "0.2.0"
