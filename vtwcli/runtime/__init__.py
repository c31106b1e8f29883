"""Executes a schedule on a transformers model; the work is in ``pruning``, the file that exported models carry."""
