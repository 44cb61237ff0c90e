"""A web page: upload images, ask questions, and see the attention of every answer token.

python demo.py runs/demo
python demo.py runs/demo --examples my_photos

The server binds to 127.0.0.1 unless --host says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli import command, parse
from config_tools import InputError, import_optional
from engine.inference.chat import Chat
from engine.inference.web_demo import CSS, MAX_FILE_BYTES, BodyLimit, build_page, example_files
from models.inference.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Serve a web page to ask a model about images."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint, run folder (its newest checkpoint), or Hub id."""
    examples: Path | None = None
    """Folder with more example images for the page."""
    host: str = "127.0.0.1"
    """Address to bind to; 0.0.0.0 makes the page reachable from the network."""
    port: int = 7860
    """Port to bind to; 0: any free port."""
    max_new_tokens: int = 128
    """Maximum length of an answer, in tokens."""
    device: str = "cpu"
    """Device: cpu, cuda or mps."""


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    if not 0 <= args.port < 2**16:
        raise InputError(f"port = {args.port}: must be between 0 (any free port) and {2**16 - 1}.")
    try:
        sampling = Sampling(max_new_tokens=args.max_new_tokens)
    except ValueError as error:
        raise InputError(f"{error}.") from None
    chat = Chat.load(args.checkpoint, args.device)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import
    gr = import_optional("gradio", "demo.py")
    uvicorn, fastapi = (import_optional(x, "demo.py", "gradio") for x in ("uvicorn", "fastapi"))
    try:
        sock = socket.create_server((args.host, args.port))
    except OSError as error:
        reason = f"cannot bind to this address ({error})"
        raise InputError(f"{args.host}:{args.port}: {reason}.") from None
    with sock, tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        examples = example_files(Path(folder), args.examples)
        blocks = build_page(chat, f"`{args.checkpoint}`", examples, sampling)
        fonts = ["system-ui", "sans-serif"]  # Gradio's default fonts would be downloaded
        # Not blocks.launch: it requests its own page, possibly through a proxy, and fails if that
        # takes more than three seconds.
        theme = gr.themes.Default(font=fonts, font_mono=["monospace"])
        app = gr.mount_gradio_app(
            fastapi.FastAPI(), blocks, "/", max_file_size=MAX_FILE_BYTES, show_error=False,
            css=CSS, theme=theme, footer_links=[], ssr_mode=False,
        )  # fmt: skip
        config = uvicorn.Config(BodyLimit(app), log_level="warning", timeout_graceful_shutdown=2)
        host, port = sock.getsockname()[:2]
        print(f"Open http://{host}:{port} (Ctrl-C stops the server)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    command(main)
