"""A Hugging Face model directory with the schedule in its config and the code that follows it."""
