"""``python -m lora2serve.serving.llama_cpp_server``: llama-cpp-python's server, with the arguments of its own command.

It takes the requests that ``llama_cpp_requests`` lets through. Host and port are those of the command line: the
environment, which upstream's command asks first, has a HOST in some shells.
"""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    """Serve until a signal ends it."""
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.cli import add_args_from_model, parse_model_from_args
    from llama_cpp.server.settings import ModelSettings, ServerSettings, Settings

    from lora2serve.serving.llama_cpp_requests import RequestLayer

    parser = argparse.ArgumentParser(prog="lora2serve serve ... --", allow_abbrev=False)
    add_args_from_model(parser, Settings)
    words = parser.parse_args()
    try:
        server, model = parse_model_from_args(ServerSettings, words), parse_model_from_args(ModelSettings, words)
    except ValueError as error:  # pydantic's
        sys.exit(f"ValueError: {error}")
    application = create_app(server_settings=server, model_settings=[model])
    layer = RequestLayer(application, model.model_alias, images=model.clip_model_path is not None, key=server.api_key)
    uvicorn.run(
        layer, host=server.host, port=server.port, ssl_keyfile=server.ssl_keyfile, ssl_certfile=server.ssl_certfile
    )


if __name__ == "__main__":
    main()
