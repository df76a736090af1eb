"""Focus: streaming concentration for efficient vision-language models (HPCA 2026), and its baselines."""

from focuslib._torchvision import declare_before_import

declare_before_import()  # before anything imports torchvision, transformers' VLM classes among them

__version__ = "0.2.0"


def load(checkpoint, **settings):
    """Load any checkpoint: a folder, a hub id in the cache, or an adapter's name (see models.registry.load)."""
    from focuslib.models.registry import load  # torch and transformers: `focus --help` needs neither

    return load(checkpoint, **settings)
