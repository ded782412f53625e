"""`rk-export serve`: bundles behind an HTTP server."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rk_export.cache_limit import cache_bytes
from rk_export.cli.terminal import print_json
from rk_export.errors import ProviderError

if TYPE_CHECKING:
    from rk_export.runtime.server.settings import ServerSettings

KEYS_VARIABLE = "RK_EXPORT_API_KEYS"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `serve` takes beside what every command on bundles takes."""
    parser.add_argument("bundles", type=Path, nargs="+", metavar="OUT", help="bundle folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="TCP port; 0 takes a free one (default 8000)")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME[=OUT]",
        help="what clients call a bundle (default: the folder's name); may be repeated",
    )
    _add_engine_arguments(parser)
    _add_limit_arguments(parser)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots", type=int, default=8, help="requests of a model that run together (default 8)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, help="requests that may wait; more get status 429 (default 64)"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="of a prompt between two steps of the running answers: fewer hold them up less (default by their speed)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="of prompt and answer together; sets the memory (default the model's, at most 4096)",
    )
    parser.add_argument(
        "--no-spinning",
        action="store_true",
        help="threads of ONNX Runtime sleep while they wait: slower, but leaves shared cores to others",
    )
    parser.add_argument(
        "--lookup",
        action="store_true",
        help="guess ahead from what the text said before; requests then run one at a time",
    )
    parser.add_argument(
        "--draft",
        type=Path,
        metavar="SMALL",
        help="a smaller bundle that guesses ahead; requests then run one at a time",
    )
    parser.add_argument(
        "--kept-prefixes",
        type=int,
        default=8,
        metavar="N",
        help="finished requests that are kept for prompts which begin alike (default 8)",
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"keys, one a line, one of which a request must carry; also ${KEYS_VARIABLE}, comma-separated",
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page's origin that may call, or *; may be repeated",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most new tokens of an answer")
    parser.add_argument("--max-body", default="4MB", metavar="SIZE", help="of a request's body (default 4MB)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request (default 600)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that running answers get when the server is told to end (default 30)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="such as 4GB, of all open models: each is opened when it is named, and idle ones are closed for it",
    )


def run_serve(args: argparse.Namespace) -> int:
    """`serve`: answer until a signal comes."""
    check_extra()
    settings = settings_of(args)
    from rk_export.runtime.server.app import create_app
    from rk_export.runtime.server.models import Models
    from rk_export.runtime.server.names import named_folders
    from rk_export.runtime.server.serve import listen, run

    models = Models(named_folders(args.bundles, args.name), settings)
    listener = listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    names = list(models.served)

    def announce() -> None:
        if args.json:
            print_json({"url": url, "models": names, "openapi": f"{url}/openapi.json"})
        else:
            print(f"{url} serves {', '.join(names)}; routes: {url}/openapi.json", flush=True)

    app = create_app(models, settings, address=listener.getsockname()[0])
    run(app, listener, announce)
    return 0


def check_extra() -> None:
    """Refuse to serve without the libraries of the extra.

    Raises:
        ProviderError: One is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ProviderError(
            f"{', '.join(missing)} not installed", where="serve", fix="pip install 'rk-export[serve]'"
        )


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """Return the settings that the arguments stand for.

    Raises:
        InputError: One is out of its range.
    """
    from rk_export.runtime.engine.records import EngineOptions
    from rk_export.runtime.providers import SessionSettings
    from rk_export.runtime.server.settings import ServerSettings, read_keys

    limit = args.memory_limit
    return ServerSettings(
        host=args.host,
        port=args.port,
        session=SessionSettings(args.provider, args.threads, spinning=not args.no_spinning),
        engine=EngineOptions(
            slots=args.slots,
            queue=args.queue,
            chunk=args.chunk,
            capacity=args.context,
            kept_prefixes=args.kept_prefixes,
            lookup=args.lookup,
        ),
        draft=args.draft,
        keys=read_keys(args.api_key_file, os.environ.get(KEYS_VARIABLE), variable=KEYS_VARIABLE),
        max_tokens=args.max_tokens,
        max_body=cache_bytes(args.max_body, "--max-body"),
        timeout=args.timeout,
        grace=args.grace,
        cors=tuple(args.cors),
        memory_limit=None if limit is None else cache_bytes(limit, "--memory-limit"),
    )
