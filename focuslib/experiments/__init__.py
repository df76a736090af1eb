"""Which cells an experiment has; run and resumed, here or on other machines."""
