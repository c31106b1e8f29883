"""ONNX graphs of a pruned model, split where tokens leave."""
