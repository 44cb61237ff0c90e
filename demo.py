"""A web page: drop pictures, ask, watch the answer come, see where the model looked.

python demo.py runs/demo
python demo.py runs/demo --examples my_photos

The page listens on this machine alone unless --host says otherwise. One question is answered at a
time, the others wait in line; what people send is bounded before it is opened.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from cli import command, parse
from config_tools import InputError
from data.images import FORMATS, open_image
from data.world import drawing, scenes
from engine.inference.attention_overlay import (
    AttentionOverlay,
    attention_overlay,
    over_picture,
    paint,
    split_pictures,
)
from engine.inference.chat import Chat, alternatives
from models.inference.sampling import Sampling

MOST_PICTURES, MOST_BYTES, MOST_PIXELS = 8, 20 * 2**20, 40_000_000
MOST_CHARACTERS, MOST_BODY = 2000, 4 * 2**20  # of a question; of a request that is no upload
MOST_WAITING = 100  # people in line
SHOWN = 5  # alternatives per token
# Gradio would make a lone picture as wide as the page, cut it off below, and cover it by its label.
CSS = "".join(
    f"#{part} .grid-container {{grid-template-columns: repeat(auto-fill, {width}px); "
    "padding-top: 24px}"
    for part, width in (("tiles", 150), ("heat", 320))
)
QUESTIONS = ("Describe the picture.", "How many things are there?", "What is at the center?",
             "What number is there?")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Open a web page to ask a model about pictures."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory, or run folder (its newest checkpoint is used)."""
    examples: Path | None = None
    """A folder of pictures to offer beside the built-in ones."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets everybody on the network in."""
    port: int = 7860
    """Port to listen on; 0: any that is free."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    device: str = "cpu"
    """cpu, cuda, mps."""


# --- What happens ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a page remembers of its last answer, small enough for many pages."""

    pictures: tuple[Image.Image, ...] = ()
    grids: tuple[tuple[slice, tuple[int, int]], ...] = ()
    words: tuple[str, ...] = ()
    likely: tuple[dict[str, float], ...] = ()
    overlay: AttentionOverlay | None = None


def open_pictures(paths: Sequence[str]) -> list[Image.Image]:
    """The uploaded files as pictures. `InputError` for the first that is too large or is none."""
    if len(paths) > MOST_PICTURES:
        raise InputError(f"{len(paths)} pictures are more than {MOST_PICTURES}.")
    pictures = []
    for path in paths:
        name = Path(path).name
        width, height = size_of(path)
        if width * height > MOST_PIXELS:
            raise InputError(
                f"{name}: {width} x {height} pixels are more than {MOST_PIXELS:,}; "
                "send a smaller one."
            )
        try:
            pictures.append(open_image(path))
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from None
    return pictures


def size_of(path: str) -> tuple[int, int]:
    """Width and height by a picture's header; (0, 0) of what is none, which open_image explains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=FORMATS) as image:
                return image.size
        except Exception:  # Pillow's plug-ins raise nearly every type on broken files
            return 0, 0


def answer(
    chat: Chat, paths: Sequence[str] | None, prompt: str, sampling: Sampling
) -> Iterator[dict]:
    """What the page shows, again for every token: answer, note, tiles, and in the end `seen`."""
    yield {"answer": "", "note": "", "tiles": [], "seen": Seen()}
    try:
        if len(prompt) > MOST_CHARACTERS:
            raise InputError(
                f"the question has {len(prompt):,} characters, more than {MOST_CHARACTERS:,}; "
                "shorten it."
            )
        pictures = open_pictures(paths or ())
        tokens = chat.prompt(prompt, pictures)
    except InputError as error:
        yield {"note": str(error)}
        return
    yield {"tiles": [enlarged(tile) for tile in tokens.tiles]}
    word = chat.processor.tokenizer.decode
    text, said, likely = "", [], []
    for piece in chat.watch(tokens, sampling):
        text += piece.text
        if piece.token is not None:
            said.append(piece.token)
            found = alternatives(piece.logits, SHOWN)
            likely.append({name(word, token): share for token, share in found})
        yield {"answer": text}
    for picture in pictures:
        picture.thumbnail((1024, 1024))
    n_image = int((tokens.ids == chat.processor.cfg.vlm_image_token_id).sum())
    seen = Seen(
        tuple(pictures),
        tuple(split_pictures(chat, pictures)),
        tuple(name(word, token) for token in said),
        tuple(likely),
        attention_overlay(chat, tokens, said) if pictures else None,
    )
    note = f"{len(tokens)} tokens in, {n_image} of them from pictures; {len(said)} out."
    yield {"note": note, "seen": seen}


def enlarged(tile: np.ndarray) -> Image.Image:
    """A tile with its pixels as squares, not blurred by the browser."""
    times = max(1, 240 // len(tile))
    return Image.fromarray(tile.repeat(times, axis=0).repeat(times, axis=1))


def name(decode, token: int) -> str:
    """A token for people: spaces are seen, the end of turn has a name, what is no text a number."""
    text = decode([token], skip_special_tokens=False)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return f"(token {token})"
    return "(end)" if text == "<end_of_utterance>" else text.replace(" ", "·").replace("\n", "⏎")


def token_view(seen: Seen, number: int) -> tuple[list[Image.Image], str, dict[str, float]]:
    """Heat maps of all pictures, a line about the token, and what else was likely."""
    if not seen.words:
        return [], "", {}
    t = min(int(number), len(seen.words)) - 1
    line = f"Token {t + 1} of {len(seen.words)}: “{seen.words[t]}”"
    if seen.overlay is None:
        return [], line, seen.likely[t]
    painted = [
        paint(picture, over_picture(seen.overlay.maps[t, tiles], *cut))
        for picture, (tiles, cut) in zip(seen.pictures, seen.grids)
    ]
    line += f"; {seen.overlay.on_pictures[t]:.0%} of the attention was on the pictures"
    return painted, line, seen.likely[t]


def example_files(folder: Path, own: Path | None) -> list[str]:
    """Pictures to try: three scenes of the built-in world, a photograph, and the user's own."""
    paths = []
    for index in (0, 1, 4):
        paths.append(folder / f"world_{index}.png")
        drawing.draw(scenes.make_scene(0, "test", index)).save(paths[-1])
    with contextlib.suppress(ImportError, OSError):  # matplotlib brings a public-domain portrait
        from matplotlib import get_data_path

        paths.append(folder / "photograph.jpg")
        Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").save(paths[-1])
    if own is not None:
        if not own.is_dir():
            raise InputError(f"examples = {own}: no such folder.")
        endings = {".jpg", ".jpeg", ".png", ".webp"}
        paths += sorted(p for p in own.iterdir() if p.suffix.lower() in endings)[:12]
    return [str(path) for path in paths if path.exists()]


# --- The page -------------------------------------------------------------------------------------


def page(chat: Chat, title: str, examples: Sequence[str], sampling: Sampling):
    """The Gradio page."""
    import gradio as gr

    with gr.Blocks(title="picoVLM", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# picoVLM\n{title}")
        seen = gr.State(Seen())
        with gr.Row():
            with gr.Column():
                files = gr.File(
                    label=f"Pictures, up to {MOST_PICTURES}",
                    file_count="multiple",
                    file_types=["image"],
                    elem_id="files",
                )
                prompt = gr.Textbox(
                    label="Question", value=QUESTIONS[0], max_length=MOST_CHARACTERS,
                    elem_id="prompt",
                )  # fmt: skip
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                said = gr.Textbox(label="Answer", lines=3, interactive=False, elem_id="answer")
                note = gr.Textbox(show_label=False, container=False, interactive=False,
                                  elem_id="note")  # fmt: skip
                tiles = gr.Gallery(label="As the model sees it", height=200, object_fit="contain",
                                   elem_id="tiles")  # fmt: skip
            with gr.Column():
                slider = gr.Slider(1, 2, 1, step=1, label="Token of the answer", elem_id="token",
                                   interactive=True)  # fmt: skip
                line = gr.Markdown(elem_id="line")
                heat = gr.Gallery(label="Where it looked for this token", height=380,
                                  object_fit="contain", elem_id="heat")  # fmt: skip
                likely = gr.Label(label="What it could have said", num_top_classes=SHOWN,
                                  elem_id="likely")  # fmt: skip
        gr.Examples([[[path], q] for path, q in zip(examples, QUESTIONS * 4)], [files, prompt])
        slots = {"answer": said, "note": note, "tiles": tiles, "seen": seen}

        def ask(paths: list[str] | None, question: str) -> Iterator[dict]:
            for update in answer(chat, paths, question or "", sampling):
                yield {slots[key]: value for key, value in update.items()}

        def counted(state: Seen) -> Any:
            return gr.Slider(1, max(2, len(state.words)), 1)

        outputs = [heat, line, likely]
        for trigger in (button.click, prompt.submit):
            asked = trigger(ask, [files, prompt], list(slots.values()), api_visibility="private")
            asked.then(counted, seen, slider, api_visibility="private").then(
                token_view, [seen, slider], outputs, api_visibility="private"
            )
        slider.release(
            token_view, [seen, slider], outputs, api_visibility="private",
            trigger_mode="always_last",  # else a move is lost while the one before is painted
        )  # fmt: skip
    return blocks.queue(default_concurrency_limit=1, max_size=MOST_WAITING)


class BodyLimit:
    """Refuses requests, uploads apart, that say they are or turn out larger than MOST_BODY."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"].endswith("/upload"):
            return await self.app(scope, receive, send)
        said = int(dict(scope["headers"]).get(b"content-length", 0))
        n_bytes = 0

        async def counted():
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            return {"type": "http.disconnect"} if n_bytes > MOST_BODY else message

        if said > MOST_BODY:
            start = {"type": "http.response.start", "status": 413, "headers": []}
            await send(start)
            return await send({"type": "http.response.body", "body": b"too large"})
        return await self.app(scope, counted, send)


def main(argv: list[str]) -> None:
    args = parse(Arguments, argv)
    if not 0 <= args.port < 2**16:
        raise InputError(f"port = {args.port}: must be at most {2**16 - 1}, or 0 for any.")
    try:
        sampling = Sampling(max_new_tokens=args.max_new_tokens)
    except ValueError as error:
        raise InputError(f"{error}.") from None
    chat = Chat.load(args.checkpoint, args.device)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI
    except ImportError:
        raise InputError("demo.py needs gradio: run `pip install gradio`.") from None
    try:
        listening = socket.create_server((args.host, args.port))
    except OSError as error:
        raise InputError(f"{args.host}:{args.port}: cannot listen there ({error}).") from None
    with listening, tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page(
            chat, f"`{args.checkpoint}`", example_files(Path(folder), args.examples), sampling
        )
        fonts = ["system-ui", "sans-serif"]  # Gradio's own would come from the network
        # Not blocks.launch: it asks itself for the page, through a proxy if there is one, and ends
        # where three seconds bring no answer, as on a busy machine.
        app = gr.mount_gradio_app(
            FastAPI(),
            blocks,
            "/",
            max_file_size=MOST_BYTES,
            show_error=False,
            css=CSS,
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
            footer_links=[],
            ssr_mode=False,
        )
        config = uvicorn.Config(BodyLimit(app), log_level="warning", timeout_graceful_shutdown=2)
        host, port = listening.getsockname()[:2]
        print(f"Open http://{host}:{port}; Ctrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    command(main)
