"""What is measured on a model: answers, candidates, costs, the searches behind calibration."""
