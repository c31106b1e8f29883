"""The search for a schedule within a goal: what is tried, on which samples, and who goes on."""
