"""What is kept of a run: provenance, finished samples, documents read back."""
