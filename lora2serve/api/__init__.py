"""The public Python API, one typed function a command: ``lora2serve.export`` is ``api.export_model.export``."""
