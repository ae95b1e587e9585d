"""Training: objectives, steps, the loop, evaluation."""
