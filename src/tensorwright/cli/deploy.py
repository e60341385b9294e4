"""`tensorwright deploy`: write a Triton model repository for an engine, and start the server if asked."""

from __future__ import annotations

import argparse

from tensorwright.cli.options import Parser, add_fields, add_switch, from_arguments
from tensorwright.cli.tables import print_table
from tensorwright.errors import UsageError
from tensorwright.serve.triton.options import DeployOptions, LaunchOptions
from tensorwright.serve.triton.settings import ServeSettings


def configure(parser: Parser) -> None:
    """Options of the repository, of the model's behaviour, and of the server."""
    add_fields(parser, DeployOptions)
    add_switch(parser, "--no_decoupled", default=False,
               help="without streaming, for clients of /infer and unary gRPC; /generate works in both forms")
    add_fields(parser.add_argument_group("behaviour of the model"), ServeSettings)
    server = parser.add_argument_group("server on this machine")
    add_switch(server, "--start", default=False, help="start the Triton server and stay until Ctrl-C")
    add_fields(server, LaunchOptions)


def main(arguments: argparse.Namespace) -> int:
    """Write the repository; with --start serve it until interrupted."""
    for name in ("engine_dir", "model_repository"):
        if not hasattr(arguments, name):
            raise UsageError(f"deploy needs --{name}", mend="tensorwright deploy --engine_dir E --model_repository R")
    options = from_arguments(DeployOptions, arguments)
    settings = from_arguments(ServeSettings, arguments, decoupled=not arguments.no_decoupled)
    launch = from_arguments(LaunchOptions, arguments)
    from tensorwright.serve.triton.repository import write_model

    place = write_model(options, settings)
    print(f"wrote {place}   (Triton loads it with --model-repository {options.model_repository})", flush=True)
    if arguments.start:
        _start(options, launch, decoupled=settings.decoupled)
    return 0


def _start(options: DeployOptions, launch: LaunchOptions, *, decoupled: bool) -> None:
    from tensorwright.serve.triton.launch import serve

    print(f"starting the Triton server for {options.model_name} ...", flush=True)
    serve(options.model_repository, options.model_name, launch, lambda: _announce(options, launch, decoupled))
    print("stopped", flush=True)


def _announce(options: DeployOptions, launch: LaunchOptions, decoupled: bool) -> None:
    model = f"{launch.url(launch.http_port)}/v2/models/{options.model_name}"
    rows = [("generate", f"{model}/generate")]
    rows.append(("generate_stream", f"{model}/generate_stream") if decoupled else ("infer", f"{model}/infer"))
    rows += [("gRPC", launch.url(launch.grpc_port).removeprefix("http://")),
             ("metrics", f"{launch.url(launch.metrics_port)}/metrics")]
    print_table("ready", rows)
    body = '{"text_input": "hi how are you?", "max_tokens": 32, "temperature": 0.2}'
    print(f"try: curl -s {model}/generate -d '{body}'\nCtrl-C stops it", flush=True)
