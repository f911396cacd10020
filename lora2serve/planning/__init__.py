"""What a training will need, known before anything is downloaded: memory by part, GPUs, disk. Imports nothing heavy."""
