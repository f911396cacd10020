"""From a model to directories: the Sink protocol, the one pass, bundles."""
