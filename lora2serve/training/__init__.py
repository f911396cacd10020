"""Fine-tuning: data, model, loop and evaluation of one run."""
