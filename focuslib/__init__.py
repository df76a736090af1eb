"""Focus: streaming concentration for efficient vision-language models (HPCA 2026), and its baselines."""

from focuslib._torchvision import declare_before_import

declare_before_import()  # before anything imports torchvision, transformers' VLM classes among them

__version__ = "0.2.0"
