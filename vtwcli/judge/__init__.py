"""What measurements say: distributions apart, K by a policy, stages, gates, significance, FLOPs."""
