"""Tables, figures and pages of the experiments, derived from results on disk. Nothing here loads or runs a model."""
