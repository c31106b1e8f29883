"""A recipe run step by step, and only what no longer holds."""
