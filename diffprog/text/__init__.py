"""Language models: objectives, prompts, sampling, generation."""
