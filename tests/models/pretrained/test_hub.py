"""Push to and pull from the Hub over HTTP, with a small Hub server on 127.0.0.1.

The server stores repositories in memory. Repositories of user `broken` answer with the HTTP status
in their name, or drop the connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from config_tools import InputError
from models.pretrained import hub as hub_module

ROOT = Path(__file__).parents[3]


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.repos[id]` is a stored repository."""

    def __init__(self):
        self.repos: dict[str, dict] = {}  # id -> {"private", "commits": [(sha, {path: bytes})]}
        self.blobs: dict[str, bytes] = {}  # uploaded large files by SHA-256
        self.calls: list[tuple[str, str, str | None]] = []  # method, path, authorization
        self.drop_after: int | None = None  # uploads that succeed before connections drop
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> tuple[str, dict] | None:
        """(sha, files) of a revision; None if it does not exist."""
        commits = self.repos[repo]["commits"]
        if revision == "main":
            return commits[-1]
        return next((c for c in commits if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: object = None, error: str = "", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def handle_call(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = self.path.split("?")[0], self.hub
        hub.calls.append((self.command, path, self.headers.get("Authorization")))
        if match := re.search(r"broken/(\w+)", path):
            return self.fail(match[1])
        for pattern, act in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return act(self, body, *match.groups())
        return self.reply(501, {"error": f"{self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_call

    def fail(self, name: str) -> None:
        if name == "dropped":
            return self.hang_up()
        status = int(name.removeprefix("status"))
        code = {401: "RepoNotFound", 404: "RepoNotFound"}.get(status, "")
        return self.reply(status, {"error": "requested"}, code)

    def may_see(self, repo: str) -> bool:
        known = self.hub.repos.get(repo)
        hidden = known is None or (known["private"] and not self.headers.get("Authorization"))
        if hidden:
            self.reply(401, error="RepoNotFound")
        return not hidden

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        if request.get("organization") == "broken":
            return self.fail(request["name"])
        repo = f"{request.get('organization') or 'user'}/{request['name']}"
        private = request.get("private") or request.get("visibility") == "private"
        if repo in self.hub.repos:
            return self.reply(409, {"url": f"{self.hub.url}/{repo}"})
        self.hub.repos[repo] = {"private": bool(private), "commits": [("0" * 40, {})]}
        return self.reply(200, {"url": f"{self.hub.url}/{repo}"})

    def preupload(self, body: bytes, repo: str) -> None:
        if self.may_see(repo):
            large = (".safetensors", "tokenizer.json", ".png")
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(large) else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self.reply(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"], "authenticated": True}
            | ({} if o["oid"] in self.hub.blobs else
               {"actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}})
            for o in json.loads(body)["objects"]
        ]  # fmt: skip
        self.reply(200, {"transfer": "basic", "objects": objects},
                   Content_Type="application/vnd.git-lfs+json")  # fmt: skip

    def upload(self, body: bytes, oid: str) -> None:
        with self.hub.lock:
            left = self.hub.drop_after
            if left is not None:
                self.hub.drop_after = left - 1
        if left is not None and left <= 0:
            return self.hang_up()
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return self.reply(200)

    def commit(self, body: bytes, repo: str) -> None:
        files = dict(self.hub.repos[repo]["commits"][-1][1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.hub.repos[repo]["commits"].append((sha, files))
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_see(repo):
            return
        found = self.hub.files(repo, revision)
        if found is None:
            return self.reply(404, error="RevisionNotFound")
        sha, files = found
        self.reply(200, {"id": repo, "modelId": repo, "sha": sha, "tags": [], "downloads": 0,
                         "private": self.hub.repos[repo]["private"],
                         "siblings": [{"rfilename": name} for name in files]})  # fmt: skip

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_see(repo):
            return
        found = self.hub.files(repo, revision)
        if found is None:
            return self.reply(404, error="RevisionNotFound")
        self.reply(200, json.dumps([
            {"type": "file", "path": name, "size": len(data),
             "oid": hashlib.sha1(data).hexdigest()}
            for name, data in found[1].items()
        ]).encode())  # fmt: skip

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if not self.may_see(repo):
            return
        sha, files = self.hub.files(repo, revision)
        if name not in files:
            return self.reply(404, error="EntryNotFound")
        etag = hashlib.sha256(files[name]).hexdigest()
        self.reply(200, files[name], X_Repo_Commit=sha, ETag=f'"{etag}"')


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", lambda self, _body: self.reply(200, {"errors": []})),
    (rf"POST /api/models/{REPO}/preupload/main", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /upload/(\w+)", Handler.upload),
    (rf"POST /api/models/{REPO}/commit/main", Handler.commit),
    (rf"GET /api/models/{REPO}/revision/([\w.-]+)", Handler.info),
    (rf"GET /api/models/{REPO}/tree/([\w.-]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([\w.-]+)/(.+)", Handler.resolve),
]


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path, python):
    """Run Python with `hub` as the Hub and without waits between retries; returns the process."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda s: None\n")

    def run(*argv: str, **env: str) -> subprocess.CompletedProcess:
        env = {
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "hf_token",
        } | env
        return python(argv, tmp_path, **env)

    return run


PULL = """
import sys, torch
from dataclasses import replace
from models.vision_language_model import VisionLanguageModel
revision = sys.argv[3] if len(sys.argv) > 3 else None
pulled = VisionLanguageModel.from_pretrained(sys.argv[1], revision=revision)
local = VisionLanguageModel.from_pretrained(sys.argv[2])
assert pulled.cfg == replace(local.cfg, vlm_base_models=(sys.argv[1],))
print(sum(torch.equal(p, q) for p, q in zip(pulled.parameters(), local.parameters())))
"""


def test_push_and_pull(hub, run, small_checkpoint, tmp_path):
    """Create, push, list, pull by id and by revision, then pull from the cache when offline."""
    done = run(str(ROOT / "export.py"), str(small_checkpoint), "--push", "user/name")
    assert done.returncode == 0 and done.stdout == f"{hub.url}/user/name\n", done.stderr
    assert hub.repos["user/name"]["private"], "private by default"
    assert all(auth == "Bearer hf_token" for _, path, auth in hub.calls if "/models/" in path)
    first, files = hub.files("user/name")
    assert set(files) == {path.name for path in small_checkpoint.iterdir()} | {"README.md"}
    assert b'AutoProcessor.from_pretrained("user/name")' in files["README.md"]
    assert b'pipeline_tag: "image-text-to-text"' in files["README.md"]

    pulled = run("-c", PULL, "user/name", str(small_checkpoint))
    assert pulled.returncode == 0 and int(pulled.stdout) > 20, pulled.stderr
    hub.repos["user/name"]["commits"].append(("f" * 40, {"config.json": b"{}"}))
    pulled = run("-c", PULL, "user/name", str(small_checkpoint), first)
    assert pulled.returncode == 0, pulled.stderr

    n_calls = len(hub.calls)
    pulled = run("-c", PULL, "user/name", str(small_checkpoint), first, HF_HUB_OFFLINE="1")
    assert pulled.returncode == 0 and len(hub.calls) == n_calls, pulled.stderr
    done = run(str(ROOT / "generate.py"), "user/other", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and len(hub.calls) == n_calls
    assert "user/other: no such" in done.stderr and "HF_HUB_OFFLINE is set" in done.stderr


PARTS = """
import sys, torch
from dataclasses import replace
from models.vision_language_model import VisionLanguageModel
model = VisionLanguageModel.from_pretrained(sys.argv[1])
print(model.vision_encoder.push_to_hub("user/vision"))
print(model.decoder.push_to_hub("user/language", private=False))
names = dict(vit_model_type="user/vision", lm_model_type="user/language")
again = VisionLanguageModel.from_backbones(replace(model.cfg, **names)).state_dict()
print(sorted(n for n, x in model.state_dict().items() if not torch.equal(x, again[n])))
"""


def test_push_encoder_and_decoder(hub, run, small_checkpoint):
    """Only the projector, which is in neither repository, differs."""
    done = run("-c", PARTS, str(small_checkpoint))
    vision, language, different = done.stdout.splitlines()
    assert vision == f"{hub.url}/user/vision", done.stderr
    assert language == f"{hub.url}/user/language"
    assert different == "['MP.proj.weight']"
    assert hub.repos["user/vision"]["private"]
    assert not hub.repos["user/language"]["private"]


def test_public_repositories(hub, run, small_checkpoint):
    done = run(str(ROOT / "export.py"), str(small_checkpoint), "--push", "user/p", "--public")
    assert done.returncode == 0 and not hub.repos["user/p"]["private"], done.stderr
    done = run(str(ROOT / "generate.py"), "user/p", "--prompt", "Hi", HF_TOKEN="")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_an_interrupted_push_resumes(hub, run, small_checkpoint):
    """The connection drops after the first of two large files; the second push sends the other."""
    hub.drop_after = 1
    argv = str(ROOT / "export.py"), str(small_checkpoint), "--push", "user/name"
    done = run(*argv)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "user/name: not pushed" in done.stderr and "no connection" in done.stderr
    assert len(hub.blobs) == 1 and hub.files("user/name")[1] == {}, (
        "an interrupted push commits nothing"
    )
    hub.drop_after, sent = None, list(hub.blobs)
    hub.calls.clear()
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    uploads = [path for method, path, _ in hub.calls if method == "PUT"]
    assert len(uploads) == 1 and sent[0] not in uploads[0]
    assert "model.safetensors" in hub.files("user/name")[1]


REFUSALS = """
import sys
from config_tools import InputError
from models.pretrained import hub
for name in sys.argv[2:]:
    for what in (lambda: hub.push(sys.argv[1], name), lambda: hub.find(name)):
        try:
            print("no error:", what())
        except InputError as error:
            print(str(error).replace(chr(10), "NEWLINE"))
"""
MESSAGES = {
    "status401": "the login is missing or not valid; run `hf auth login`",
    "status403": "the login has no access to the repository",
    "status404": "no such repository is visible to this login",
    "status500": "the Hub answered 500; try again later",
    "dropped": "no connection to http://127.0.0.1",
}


def test_every_failure_is_one_sentence(run, tmp_path):
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "config.json").write_text("{}")
    done = run("-c", REFUSALS, str(tmp_path / "up"), *[f"broken/{name}" for name in MESSAGES])
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2 * len(MESSAGES), done.stderr
    for i, (name, words) in enumerate(MESSAGES.items()):
        pushed, pulled = lines[2 * i : 2 * i + 2]
        assert pushed.startswith(f"broken/{name}: not pushed: {words}"), pushed
        assert pulled.startswith(f"broken/{name}: no such checkpoint directory, "), pulled
        assert words in pulled, pulled
        assert "NEWLINE" not in pushed + pulled and pulled.endswith(".") and pushed.endswith(".")


def test_private_repository_and_missing_revision(hub, run, small_checkpoint):
    hub.repos["user/secret"] = {"private": True, "commits": [("a" * 40, {})]}
    done = run("-c", PULL, "user/secret", str(small_checkpoint), HF_TOKEN="")
    assert "the login is missing or not valid" in done.stderr.splitlines()[-1]
    done = run("-c", PULL, "user/secret", str(small_checkpoint), "v9")
    assert "from the Hub at revision v9 failed: the repository has no such revision" in done.stderr


def test_no_login_and_no_network(run, small_checkpoint):
    argv = str(ROOT / "export.py"), str(small_checkpoint), "--push", "user/name"
    done = run(*argv, HF_TOKEN="")
    assert done.returncode == 2 and "a push needs a login" in done.stderr, done.stderr
    done = run(*argv, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and "no connection to http://127.0.0.1:9" in done.stderr


def test_invalid_repository_names(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for name in ("name", "a/b/c", "user/na me", "/user", "../up/x"):
        with pytest.raises(InputError, match="is not a repository name"):
            hub_module.push(tmp_path, name)
    for name in ("a/b/c", "/nowhere/x", "../x", "~/x", "user/na me"):
        with pytest.raises(InputError, match=r": no such checkpoint directory\.$"):
            hub_module.find(name)


def test_training_pushes_at_the_end(hub, run, run_file, tmp_path, minute_config, monkeypatch):
    """The model card describes the run; name and login are checked before the first step."""
    argv = [str(ROOT / "train.py"), str(run_file()), "--train.steps", "2"]
    assert "must be user/name" in run(*argv, "--train.push", "name").stderr
    done = run(*argv, "--train.push", "user/run", HF_TOKEN="")
    assert "a push needs a login" in done.stderr and not (tmp_path / "run").exists()
    assert not hub.calls
    done = run(*argv, "--train.push", "user/run")
    assert done.returncode == 0 and f"pushed to {hub.url}/user/run" in done.stdout, done.stderr
    files = hub.files("user/run")[1]
    assert "state.pt" not in files and {"loss.png", "train_config.json"} <= set(files)
    card = files["README.md"].decode()
    for words in (
        "rows.jsonl, SHA-256 ", "| steps | 2 of 2 |", "| hardware | 1 process(es) on ",
        "python train.py train_config.json", "![training loss", "| last loss | ",
    ):  # fmt: skip
        assert words in card, card
