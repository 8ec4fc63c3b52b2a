"""Recovery passes: what pruning took from a model is brought back, without labels."""
