"""The families of models, and what is particular to the checkpoints of each."""
