"""The demo page: answers, error messages, and a running server under load."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import threading
import time
import urllib.request
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
from cli import command
from config_tools import InputError
from engine.inference import web_demo
from engine.inference.chat import Chat
from models.inference.sampling import Sampling
from models.vision_language_model import VisionLanguageModel

ROOT = Path(__file__).parent.parent
MAX_NEW_TOKENS = 24  # random weights never end a turn


@pytest.fixture(scope="module")
def chat(small_checkpoint) -> Chat:
    return Chat.load(small_checkpoint)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    noise = Image.effect_noise((60, 40), 90).convert("RGB")
    noise.save(folder / "noise.png")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    (folder / "text.png").write_text("not an image")
    return {path.stem: path for path in folder.iterdir()}


def run_answer(chat: Chat, paths: list[Path], prompt: str) -> dict:
    state: dict = {}
    for update in web_demo.answer(chat, [str(p) for p in paths], prompt, Sampling(6)):
        state |= update
    return state


def test_answer_and_token_view(chat, images):
    state = run_answer(chat, [images["noise"]], "What is it?")
    assert state["answer"] == chat("What is it?", [images["noise"]], Sampling(6))
    assert [tile.size for tile in state["tiles"]] == [(240, 240)], "16 pixels, 15 times"
    shown = state["state"]
    assert len(shown.words) == len(shown.alternatives) == len(shown.overlay.maps) == 6
    for number in (1, 6):
        (painted,), line, likely = web_demo.token_view(shown, number)
        assert painted.width == 480 and f"Token {number} of 6" in line and "%" in line
        assert shown.words[number - 1] == max(likely, key=likely.get)
        assert 0 < sum(likely.values()) <= 1 + 1e-6
    maps = [np.asarray(web_demo.token_view(shown, n)[0][0]) for n in (1, 2)]
    assert np.abs(maps[0].astype(int) - maps[1]).max() > 20, "attention differs per token"
    state = run_answer(chat, [], "Hello?")
    assert web_demo.token_view(state["state"], 1)[0] == [] and state["answer"]
    assert web_demo.token_view(web_demo.AnswerState(), 1) == ([], "", {})


def test_overlay_of_an_image_with_several_tiles(images, lively, minute_config, tiny_processor):
    """As in SmolVLM: a grid of tiles and a downscaled image."""
    cfg = minute_config(max_img_size=32, lm_max_position_embeddings=256)
    chat = Chat(lively(VisionLanguageModel(cfg)), replace(tiny_processor, cfg=cfg))
    state = run_answer(chat, [images["noise"]] * 2, "What?")
    assert len(state["tiles"]) == 2 * (2 * 2 + 1) == state["state"].overlay.maps.shape[1]
    assert [p.size for p in web_demo.token_view(state["state"], 1)[0]] == [(480, 320)] * 2


@pytest.mark.parametrize(
    ("names", "prompt", "message"),
    [
        (["text"], "What?", "text.png: not a readable image"),
        (["huge"], "What?", "huge.png: 10000 x 10000 pixels, but the maximum is 40,000,000"),
        (["noise"] * 9, "What?", "9 images, but the maximum is 8"),
        (["noise"], "x" * 2001, "2,001 characters, but the maximum is 2,000"),
        (["noise"] * 8, "word " * 300, "context ends at 256"),
        ([], "  ", "the prompt is empty"),
        ([], "<image>?", "1 <image> placeholders for 0 images"),
    ],
)
def test_error_messages(chat, images, names, prompt, message):
    state = run_answer(chat, [images[n] for n in names], prompt)
    assert message in state["note"] and "/" not in state["note"].split("(")[0], (
        "no path of the server"
    )
    assert state["answer"] == "" and state["state"] == web_demo.AnswerState()


def test_examples(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "mine.jpg")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "new").mkdir()
    files = web_demo.example_files(tmp_path / "new", tmp_path)
    assert sum("world_" in f for f in files) == 3 and files[-1].endswith("mine.jpg")
    assert all(Image.open(f).size for f in files)
    with pytest.raises(InputError, match="no such folder"):
        web_demo.example_files(tmp_path / "new", tmp_path / "nowhere")


def test_missing_checkpoint(tmp_path, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with pytest.raises(SystemExit) as stop:
        command(demo.main, [str(tmp_path)])
    assert stop.value.code == 2 and "neither a checkpoint" in capsys.readouterr().err


# --- A running page -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("gradio", reason="gradio is not installed: the demo page is not tested")
    path = ROOT / "docs/demo_screenshot.py"
    spec = importlib.util.spec_from_file_location("demo_screenshot", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(script, small_checkpoint):
    # docs/answering.md reports figures with a trained model.
    checkpoint = os.environ.get("DEMO_CHECKPOINT", str(small_checkpoint))
    nowhere = "http://127.0.0.1:9"  # the server must not request its own page through a proxy
    flags = ("--max-new-tokens", str(MAX_NEW_TOKENS))
    with script.serving(checkpoint, *flags, http_proxy=nowhere) as (address, pid):
        yield address, pid


class User:
    """A client that behaves like a browser tab."""

    def __init__(self, address: str):
        self.address, self.session = address, uuid.uuid4().hex
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        config = json.loads(self.open(f"{address}/config", timeout=120).read())
        self.number = next(d["id"] for d in config["dependencies"] if d["api_name"] == "ask")

    def upload(self, path: Path) -> dict:
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"'
        body = f"{head}\r\nContent-Type: image/png\r\n\r\n".encode() + path.read_bytes()
        request = urllib.request.Request(
            f"{self.address}/gradio_api/upload",
            body + f"\r\n--{edge}--\r\n".encode(),
            {"Content-Type": f"multipart/form-data; boundary={edge}"},
        )
        (stored,) = json.loads(self.open(request, timeout=120).read())
        return {"path": stored, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def join(self, files: list[dict], prompt: str) -> None:
        data = {"data": [files, prompt], "fn_index": self.number, "session_hash": self.session}
        request = urllib.request.Request(
            f"{self.address}/gradio_api/queue/join",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        self.open(request, timeout=120).read()

    def events(self):
        url = f"{self.address}/gradio_api/queue/data?session_hash={self.session}"
        with self.open(url, timeout=240) as stream:
            for line in stream:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    def ask(self, paths: list[Path], prompt: str) -> dict:
        """Ask; return the last event, with `success` and the texts of the page."""
        self.join([self.upload(p) for p in paths], prompt)
        for event in self.events():
            if event["msg"] == "process_completed":
                return event
        raise AssertionError("the stream ended early")


def note_of(event: dict) -> str:
    """The output of an event as text."""
    return json.dumps(event["output"], ensure_ascii=False)


def peak_memory(pid: int) -> int:
    """Peak resident memory of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def cpu_seconds(pid: int) -> float:
    """CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_server_survives_abuse_and_many_users(server, images):
    address, pid = server
    noise = images["noise"]
    assert User(address).ask([noise], "What is it?")["success"]
    before = peak_memory(pid)
    for paths, prompt, message in (
        ([images["text"]], "What?", "not a readable image"),
        ([images["huge"]], "What?", "pixels, but the maximum"),
        ([noise], "x" * 1_000_000, "1,000,000 characters"),
    ):
        event = User(address).ask(paths, prompt)
        assert event["success"] and message in note_of(event), note_of(event)[:500]
    with pytest.raises(OSError):  # 413, or the connection is cut
        User(address).join([], "x" * 5_000_000)
    abused = peak_memory(pid) - before
    assert abused < 150 * 2**20
    # A client disconnects during an answer; the next one is served.
    gone = User(address)
    gone.join([gone.upload(noise)], "What is it?")
    for event in gone.events():
        if event["msg"] in ("process_generating", "process_completed"):
            break
    assert User(address).ask([noise], "What is it?")["success"]
    # Twenty clients at once.
    results: list[dict] = []
    users = [User(address) for _ in range(20)]
    threads = [
        threading.Thread(target=lambda u=u: results.append(u.ask([noise], "What?")), daemon=True)
        for u in users
    ]
    start, worked = time.monotonic(), cpu_seconds(pid)
    for thread in threads:
        thread.start()
    for thread in threads:  # generous, as the machine may be busy; a deadlock still fails
        thread.join(max(0, start + 900 - time.monotonic()))
    assert len(results) == 20 and all(event["success"] for event in results)
    seconds, worked = time.monotonic() - start, cpu_seconds(pid) - worked
    crowded = peak_memory(pid) - before
    assert worked < 60 and crowded < 300 * 2**20
    print(f"{before / 2**20:.0f} MiB; {abused / 2**20:.0f} MiB more after abuse, "
          f"{crowded / 2**20:.0f} MiB more with twenty clients ({worked:.1f} s of CPU time, "
          f"{seconds:.1f} s)")  # fmt: skip


def test_the_server_binds_to_loopback(server):
    address, pid = server
    port = int(address.rsplit(":", 1)[1])
    table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    listening = [row.split()[1] for row in table if row.split()[3] == "0A"]
    assert [a for a in listening if int(a.split(":")[1], 16) == port] == [f"0100007F:{port:04X}"]


def test_in_a_browser(script, server, images, tmp_path, chat):
    """Upload an image, ask, read the answer, move the slider, take a screenshot."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromium-driver: the page is not tested in a browser")
    pytest.importorskip("selenium", reason="no selenium: the page is not tested in a browser")
    with script.browser() as driver:
        answer = script.ask(driver, server[0], images["noise"], "What is it?", tmp_path / "s.png")
        logs = [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    assert answer == chat("What is it?", [images["noise"]], Sampling(MAX_NEW_TOKENS))
    assert not [m for m in logs if "127.0.0.1" in m and "favicon" not in m], logs
    assert Image.open(tmp_path / "s.png").width >= 1300
