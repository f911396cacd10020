"""One output format each; every converter is a sink of lora2serve.exporting.sinks."""
