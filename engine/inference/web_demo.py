"""The web demo: a Gradio page that answers questions and shows attention overlays.

One question is answered at a time; the others wait in a queue. Uploads are limited in number and
size before they are opened. Not here: the server and its flags (demo.py).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from config_tools import InputError
from data.images import FORMATS, open_image
from data.world import drawing, scenes
from engine.inference import attention_overlay as overlays
from engine.inference.chat import Chat, top_tokens
from models.inference.sampling import Sampling

MAX_IMAGES, MAX_FILE_BYTES, MAX_PIXELS = 8, 20 * 2**20, 40_000_000
MAX_CHARACTERS = 2000  # of a question
MAX_BODY_BYTES = 4 * 2**20  # of a request other than an upload
MAX_QUEUE = 100  # waiting questions
N_ALTERNATIVES = 5  # per token
# Without this, Gradio scales a single image to the page width, crops it and covers it by a label.
CSS = "".join(
    f"#{part} .grid-container {{grid-template-columns: repeat(auto-fill, {width}px); "
    "padding-top: 24px}"
    for part, width in (("tiles", 150), ("heat", 320))
)
QUESTIONS = ("Describe the picture.", "How many things are there?", "What is at the center?",
             "What number is there?")  # fmt: skip


# --- Answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerState:
    """The last answer of a page: images, tokens, alternatives and attention."""

    images: tuple[Image.Image, ...] = ()
    tiles: tuple[tuple[slice, tuple[int, int]], ...] = ()  # of each image: tiles, grid
    words: tuple[str, ...] = ()
    alternatives: tuple[dict[str, float], ...] = ()
    overlay: overlays.AttentionOverlay | None = None


def open_images(paths: Sequence[str]) -> list[Image.Image]:
    """Open uploaded images; raises `InputError` if there are too many, or one is too large."""
    if len(paths) > MAX_IMAGES:
        raise InputError(f"{len(paths)} images, but the maximum is {MAX_IMAGES}; send fewer.")
    images = []
    for path in paths:
        name, width, height = Path(path).name, 0, 0
        # Pillow may raise any exception for a broken file; open_image below reports it.
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
        if width * height > MAX_PIXELS:
            size = f"{width} x {height} pixels, but the maximum is {MAX_PIXELS:,}"
            raise InputError(f"{name}: {size}; send a smaller image.")
        try:
            images.append(open_image(path))
        except InputError as error:
            raise InputError(str(error).replace(path, name)) from None
    return images


def answer(
    chat: Chat, paths: Sequence[str] | None, prompt: str, sampling: Sampling
) -> Iterator[dict]:
    """Yield updates of the page: answer, note and tiles, and at the end the `AnswerState`."""
    yield {"answer": "", "note": "", "tiles": [], "state": AnswerState()}
    try:
        if len(prompt) > MAX_CHARACTERS:
            size = f"{len(prompt):,} characters, but the maximum is {MAX_CHARACTERS:,}"
            raise InputError(f"the question has {size}; shorten it.")
        images = open_images(paths or ())
        prompt_tokens = chat.encode_prompt(prompt, images)
    except InputError as error:
        yield {"note": str(error)}
        return
    yield {"tiles": [enlarge(tile) for tile in prompt_tokens.tiles]}
    decode = chat.processor.tokenizer.decode
    text, tokens, alternatives = "", [], []
    for chunk in chat.stream_chunks(prompt_tokens, sampling):
        text += chunk.text
        if chunk.token is not None and chunk.logits is not None:
            tokens.append(chunk.token)
            top = top_tokens(chunk.logits, N_ALTERNATIVES)
            alternatives.append({token_name(decode, token): p for token, p in top})
        yield {"answer": text}
    for image in images:
        image.thumbnail((1024, 1024))
    n_image = int((prompt_tokens.ids == chat.processor.cfg.vlm_image_token_id).sum())
    state = AnswerState(
        tuple(images),
        tuple(overlays.split_tiles(chat, images)),
        tuple(token_name(decode, token) for token in tokens),
        tuple(alternatives),
        overlays.attention_overlay(chat, prompt_tokens, tokens) if images else None,
    )
    n_prompt = f"{len(prompt_tokens)} prompt tokens, {n_image} of them image tokens"
    yield {"note": f"{n_prompt}; {len(tokens)} answer tokens.", "state": state}


def enlarge(tile: np.ndarray) -> Image.Image:
    """Enlarge a small tile without blur, which the browser would add."""
    times = max(1, 240 // len(tile))
    return Image.fromarray(tile.repeat(times, axis=0).repeat(times, axis=1))


def token_name(decode, token: int) -> str:
    """A readable token: visible spaces, (end) for the end of turn, an id if it is not text."""
    text = decode([token], skip_special_tokens=False)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return f"(token {token})"
    return "(end)" if text == "<end_of_utterance>" else text.replace(" ", "·").replace("\n", "⏎")


def token_view(state: AnswerState, number: int) -> tuple[list[Image.Image], str, dict[str, float]]:
    """Attention overlays of all images, a line about the token, and its alternatives."""
    if not state.words:
        return [], "", {}
    t = min(number, len(state.words)) - 1
    line = f"Token {t + 1} of {len(state.words)}: “{state.words[t]}”"
    if state.overlay is None:
        return [], line, state.alternatives[t]
    maps = state.overlay.maps[t]  # [N, G, G]
    heats = [overlays.merge_tile_maps(maps[tiles], *grid) for tiles, grid in state.tiles]
    painted = [overlays.paint_heatmap(*pair) for pair in zip(state.images, heats)]
    line += f"; {state.overlay.on_images[t]:.0%} of the attention is on the images"
    return painted, line, state.alternatives[t]


def example_files(folder: Path, own: Path | None) -> list[str]:
    """Example images: three built-in scenes, a photo, and up to 12 of the folder `own`."""
    paths = []
    for index in (0, 1, 4):
        paths.append(folder / f"world_{index}.png")
        drawing.draw(scenes.make_scene(0, "test", index)).save(paths[-1])
    with contextlib.suppress(ImportError, OSError):  # matplotlib ships a public-domain photo
        from matplotlib import get_data_path

        paths.append(folder / "photograph.jpg")
        Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").save(paths[-1])
    if own is not None:
        if not own.is_dir():
            raise InputError(f"examples = {own}: no such folder.")
        endings = {".jpg", ".jpeg", ".png", ".webp"}
        paths += sorted(p for p in own.iterdir() if p.suffix.lower() in endings)[:12]
    return [str(path) for path in paths if path.exists()]


# --- Page -----------------------------------------------------------------------------------------


def build_page(chat: Chat, title: str, examples: Sequence[str], sampling: Sampling) -> Any:
    """Build the page: a `gradio.Blocks` with its queue."""
    import gradio as gr

    with gr.Blocks(title="picoVLM", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# picoVLM\n{title}")
        state = gr.State(AnswerState())
        with gr.Row():
            with gr.Column():
                files = gr.File(label=f"Images, up to {MAX_IMAGES}", file_count="multiple",
                                file_types=["image"], elem_id="files")  # fmt: skip
                prompt = gr.Textbox(label="Question", value=QUESTIONS[0], elem_id="prompt",
                                    max_length=MAX_CHARACTERS)  # fmt: skip
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                reply = gr.Textbox(label="Answer", lines=3, interactive=False, elem_id="answer")
                note = gr.Textbox(show_label=False, container=False, interactive=False,
                                  elem_id="note")  # fmt: skip
                tiles = gr.Gallery(label="Tiles that the model gets", height=200,
                                   object_fit="contain", elem_id="tiles")  # fmt: skip
            with gr.Column():
                slider = gr.Slider(1, 2, 1, step=1, label="Token of the answer", elem_id="token",
                                   interactive=True)  # fmt: skip
                line = gr.Markdown(elem_id="line")
                heat = gr.Gallery(label="Attention for this token", height=380,
                                  object_fit="contain", elem_id="heat")  # fmt: skip
                alternatives = gr.Label(label="Alternatives to this token", elem_id="likely",
                                        num_top_classes=N_ALTERNATIVES)  # fmt: skip
        gr.Examples([[[path], q] for path, q in zip(examples, QUESTIONS * 4)], [files, prompt])
        slots = {"answer": reply, "note": note, "tiles": tiles, "state": state}

        def ask(paths: list[str] | None, question: str) -> Iterator[dict]:
            for update in answer(chat, paths, question or "", sampling):
                yield {slots[key]: value for key, value in update.items()}

        def reset_slider(new: AnswerState) -> Any:
            return gr.Slider(1, max(2, len(new.words)), 1)

        private: Any = {"api_visibility": "private"}
        view = token_view, [state, slider], [heat, line, alternatives]
        for trigger in (button.click, prompt.submit):
            answered = trigger(ask, [files, prompt], list(slots.values()), **private)
            answered.then(reset_slider, state, slider, **private).then(*view, **private)
        # Without always_last, moves during an update are lost.
        slider.release(*view, trigger_mode="always_last", **private)
    return blocks.queue(default_concurrency_limit=1, max_size=MAX_QUEUE)


class BodyLimit:
    """ASGI middleware that rejects request bodies above MAX_BODY_BYTES, except uploads."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"].endswith("/upload"):
            return await self.app(scope, receive, send)
        n_announced = int(dict(scope["headers"]).get(b"content-length", 0))
        n_bytes = 0

        async def receive_counted():
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            return {"type": "http.disconnect"} if n_bytes > MAX_BODY_BYTES else message

        if n_announced > MAX_BODY_BYTES:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            return await send({"type": "http.response.body", "body": b"too large"})
        return await self.app(scope, receive_counted, send)
