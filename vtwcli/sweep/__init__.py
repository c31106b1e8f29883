"""Many schedules in one pass through the layers."""
