"""What is said of a model: scores, completions, and whether one model is better than another."""
