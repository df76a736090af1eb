"""How the embedded tiny VLM was made: `python -m training.train --out RUN`. Not part of the installed package."""
