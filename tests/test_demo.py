"""The demo page: what it computes, what it refuses, and that it stays alive."""

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
LONGEST = 24  # tokens of an answer: random weights never end a turn


@pytest.fixture(scope="module")
def chat(small_checkpoint) -> Chat:
    return Chat.load(small_checkpoint)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    noise = Image.effect_noise((60, 40), 90).convert("RGB")
    noise.save(folder / "noise.png")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    (folder / "text.png").write_text("not a picture at all")
    return {path.stem: path for path in folder.iterdir()}


def shown(chat: Chat, paths: list[Path], prompt: str) -> dict:
    state: dict = {}
    for update in web_demo.answer(chat, [str(p) for p in paths], prompt, Sampling(6)):
        state |= update
    return state


def test_it_answers_as_the_model_does(chat, pictures):
    state = shown(chat, [pictures["noise"]], "What is it?")
    assert state["answer"] == chat("What is it?", [pictures["noise"]], Sampling(6))
    assert [tile.size for tile in state["tiles"]] == [(240, 240)], "16 pixels, 15 times"
    seen = state["state"]
    assert len(seen.words) == len(seen.alternatives) == len(seen.overlay.maps) == 6
    for number in (1, 6):
        (painted,), line, likely = web_demo.token_view(seen, number)
        assert painted.width == 480 and f"Token {number} of 6" in line and "%" in line
        assert seen.words[number - 1] == max(likely, key=likely.get)
        assert 0 < sum(likely.values()) <= 1 + 1e-6
    maps = [np.asarray(web_demo.token_view(seen, n)[0][0]) for n in (1, 2)]
    assert np.abs(maps[0].astype(int) - maps[1]).max() > 20, "each token looks elsewhere"
    state = shown(chat, [], "Hello?")
    assert web_demo.token_view(state["state"], 1)[0] == [] and state["answer"]
    assert web_demo.token_view(web_demo.AnswerState(), 1) == ([], "", {})


def test_a_picture_cut_into_tiles_is_painted_whole(pictures, lively, minute_config, tiny_processor):
    """As SmolVLM's are: a grid of tiles and a view of the whole."""
    cfg = minute_config(max_img_size=32, lm_max_position_embeddings=256)
    chat = Chat(lively(VisionLanguageModel(cfg)), replace(tiny_processor, cfg=cfg))
    state = shown(chat, [pictures["noise"]] * 2, "What?")
    assert len(state["tiles"]) == 2 * (2 * 2 + 1) == state["state"].overlay.maps.shape[1]
    assert [p.size for p in web_demo.token_view(state["state"], 1)[0]] == [(480, 320)] * 2


@pytest.mark.parametrize(
    ("names", "prompt", "says"),
    [
        (["text"], "What?", "text.png: not a readable image"),
        (["huge"], "What?", "huge.png: 10000 x 10000 pixels are more than 40,000,000"),
        (["noise"] * 9, "What?", "9 images are more than 8"),
        (["noise"], "x" * 2001, "2,001 characters, more than 2,000"),
        (["noise"] * 8, "word " * 300, "context ends at 256"),
        ([], "  ", "the prompt is empty"),
        ([], "<image>?", "1 <image> placeholders for 0 images"),
    ],
)
def test_what_it_cannot_answer_gets_one_sentence(chat, pictures, names, prompt, says):
    state = shown(chat, [pictures[n] for n in names], prompt)
    assert says in state["note"] and "/" not in state["note"].split("(")[0], "no path of ours"
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


def test_a_checkpoint_that_is_none(tmp_path, capsys):
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
    # The figures of docs/answering.md are of a trained model.
    checkpoint = os.environ.get("DEMO_CHECKPOINT", str(small_checkpoint))
    nowhere = "http://127.0.0.1:9"  # the page must not ask for itself through a proxy
    flags = ("--max-new-tokens", str(LONGEST))
    with script.serving(checkpoint, *flags, http_proxy=nowhere) as (address, pid):
        yield address, pid


class User:
    """A browser tab, as the server sees one."""

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
        """The last event: whether it went well, and the page's texts by then."""
        self.join([self.upload(p) for p in paths], prompt)
        for event in self.events():
            if event["msg"] == "process_completed":
                return event
        raise AssertionError("the stream ended early")


def note_of(event: dict) -> str:
    """The last words on the page, wherever they stand in the event."""
    return json.dumps(event["output"], ensure_ascii=False)


def peak_memory(pid: int) -> int:
    """Most bytes the process ever held."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def cpu_seconds(pid: int) -> float:
    """What the process has computed, whatever else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_abuse_leaves_the_page_alive_and_small(server, pictures):
    address, pid = server
    noise = pictures["noise"]
    assert User(address).ask([noise], "What is it?")["success"]
    before = peak_memory(pid)
    for paths, prompt, says in (
        ([pictures["text"]], "What?", "not a readable image"),
        ([pictures["huge"]], "What?", "pixels are more than"),
        ([noise], "x" * 1_000_000, "1,000,000 characters"),
    ):
        event = User(address).ask(paths, prompt)
        assert event["success"] and says in note_of(event), note_of(event)[:500]
    with pytest.raises(OSError):  # 413, or the connection is cut
        User(address).join([], "x" * 5_000_000)
    abused = peak_memory(pid) - before
    assert abused < 150 * 2**20
    # A tab that is closed while the answer comes; the next person is served.
    gone = User(address)
    gone.join([gone.upload(noise)], "What is it?")
    for event in gone.events():
        if event["msg"] in ("process_generating", "process_completed"):
            break
    assert User(address).ask([noise], "What is it?")["success"]
    # Twenty at once, one after the other.
    results: list[dict] = []
    users = [User(address) for _ in range(20)]
    threads = [
        threading.Thread(target=lambda u=u: results.append(u.ask([noise], "What?")), daemon=True)
        for u in users
    ]
    start, worked = time.monotonic(), cpu_seconds(pid)
    for thread in threads:
        thread.start()
    for thread in threads:  # other work on the machine may take this long; a queue that hangs fails
        thread.join(max(0, start + 900 - time.monotonic()))
    assert len(results) == 20 and all(event["success"] for event in results)
    seconds, worked = time.monotonic() - start, cpu_seconds(pid) - worked
    crowded = peak_memory(pid) - before
    assert worked < 60 and crowded < 300 * 2**20
    print(f"{before / 2**20:.0f} MiB; {abused / 2**20:.0f} more when abused, {crowded / 2**20:.0f} "
          f"with twenty people, who took {worked:.1f} s of the processor, {seconds:.1f} by the "
          "clock")  # fmt: skip


def test_it_listens_on_loopback_alone(server):
    address, pid = server
    port = int(address.rsplit(":", 1)[1])
    table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    listening = [row.split()[1] for row in table if row.split()[3] == "0A"]
    assert [a for a in listening if int(a.split(":")[1], 16) == port] == [f"0100007F:{port:04X}"]


def test_in_a_browser(script, server, pictures, tmp_path, chat):
    """Uploads, asks, reads the answer, moves the slider, takes a picture."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromium-driver: the page is not tested in a browser")
    pytest.importorskip("selenium", reason="no selenium: the page is not tested in a browser")
    with script.browser() as driver:
        answer = script.ask(driver, server[0], pictures["noise"], "What is it?", tmp_path / "s.png")
        logs = [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    assert answer == chat("What is it?", [pictures["noise"]], Sampling(LONGEST))
    assert not [m for m in logs if "127.0.0.1" in m and "favicon" not in m], logs
    assert Image.open(tmp_path / "s.png").width >= 1300
