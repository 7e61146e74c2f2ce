"""Publishing, to an imitation of the hub on 127.0.0.1."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

import data.publish
from data.checkpoints.checkpoint import load
from data.checkpoints.config import GPT2Config, to_hf
from data.checkpoints.initialize import initial_weights
from data.checkpoints.sums import weights_sha256
from data.publish import main
from data.runs.card import evaluation
from data.runs.run_folder import RunFolder, write_sealed
from data.testing import Result, call, refused, save_model
from data.text.tokenizer import gpt2

CONFIG = GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=8)
ME = "me/my-gpt2"


class Hub:
    """Models by name: their files, and whether they are private. `writes` is what was changed; `deny`, if not 0, what
    all writes are answered with.
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.writes: list[str] = []
        self.asked: list[str] = []
        self.messages: list[str] = []
        self.deny = 0
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if method == "GET":
            name = path.removeprefix("/api/models/").removesuffix("/revision/main")
            if name not in self.models:
                return 404, {"error": "Repository not found"}
            files = [{"rfilename": file} for file in self.models[name]]
            return 200, {"id": name, "private": self.private[name], "siblings": files}
        if path == "/api/validate-yaml":  # the front matter of a card
            return 200, {"errors": [], "warnings": []}
        self.writes.append(path)
        if self.deny:
            return self.deny, {"error": "You don't have the rights"}
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.models[name] = {".gitattributes": b""}
            self.private[name] = asked.get("visibility") == "private"
            return 200, {"url": f"{self.address}/{name}"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            kind = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": kind[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.address}/blob/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"objects": objects, "transfer": "basic"}
        assert path.endswith("/commit/main"), path
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.models[name][value["path"]] = base64.b64decode(value["content"])
            else:
                self.models[name][value["path"]] = self.blobs[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'ab' * 20}", "commitOid": "ab" * 20, "success": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, said = found.answer(self.command, self.path, body)
            content = json.dumps(said).encode()
            self.send_response(code)
            missing = {"X-Error-Code": "RepoNotFound"} if code == 404 else {}
            for name, value in (
                {"Content-Length": str(len(content)), "Content-Type": "application/json"} | missing
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    found.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose transfers are not imitated
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._REGISTRY_FETCH_TIMEOUT", 0.2)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two checkpoints."""
    options = {"init": "gpt2", "data": "stories", "steps": 9, "grad_accum": 1, "batch_size": 2, "seq_len": 8, "lr": 0.1}
    options |= {"min_lr": 0.01, "warmup": 1, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip": 1.0, "seed": 5}
    facts = {"command": ["train"], "versions": {"torch": "1"}, "config": to_hf(CONFIG), "parameters": 999}
    facts |= {"device": "CPU", "card": "an abacus", "data": {"folder": "d", "checksum": "c"}}
    out = RunFolder.create(tmp_path / "mine", facts | {"options": options, "hub": {"model": "gpt2", "dataset": None}})
    arrays = initial_weights(CONFIG, 1)
    moments = {f"{m}.{name}": a for m in ("exp_avg", "exp_avg_sq") for name, a in arrays.items()}
    for step in (0, 1):
        out.add_metrics({"step": step, "tokens": step, "seconds": 0.0, "val_loss": 3.0 - step})
        state = {"step": step, "tokens": step, "seconds": 0.0, "loader": {}, "options": options | {"dtype": "float32"}}
        page = "---\ntags:\n- gpt2\n---\n\n# The card of step 0\n" if step == 0 else None
        out.save_checkpoint(CONFIG, arrays, moments, state, gpt2(), card=page)
    return out.path


def publish(folder: Path, *options: object) -> Result:
    return call(main, folder.name, "--to", ME, *options, cwd=folder.parent)


def test_what_is_sent(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """The newest checkpoint, without what only training needs; with the card of its run, where it has none itself."""
    result = publish(folder, "--license", "mit", "--private")
    assert result.code == 0, result
    sent = hub.models[ME]
    latest = folder / "checkpoints" / "step-1"
    left_out = {"optimizer.safetensors", "trainer.json", "SHA256SUMS"}
    assert sent.keys() - {".gitattributes"} == {path.name for path in latest.iterdir()} - left_out | {"README.md"}
    for path in latest.iterdir():
        if path.name not in left_out:
            assert sent[path.name] == path.read_bytes()
    card = ModelCard(sent["README.md"].decode())
    assert card.data.to_dict() == {
        **{"language": "en", "license": "mit", "base_model": "gpt2", "library_name": "transformers"},
        **{"tags": ["gpt2", "pytorch"], "pipeline_tag": "text-generation"},
    }
    assert "after 1 steps" in card.text
    assert "loss.png" not in card.text  # which is not there
    assert hub.private[ME]
    assert hub.messages == ["mine: step-1"]
    assert f"making {ME}, and sending the files" in result.out
    assert result.out.endswith(f"{ME} has it: {hub.address}/{ME}/commit/{'ab' * 20}\n")
    for name, content in sent.items():  # and it can be loaded
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert load(tmp_path / "got")[0].n_embd == 2


def test_a_checkpoint_with_a_card_and_scores(hub: Hub, folder: Path) -> None:
    """Its own card, with what was evaluated of this step; the folder stays as it is."""
    step_0 = folder / "checkpoints" / "step-0"
    row = {"step": 0, "weights": weights_sha256(step_0), "task": "t", "metric": "acc", "value": 0.5, "stderr": 0.125}
    write_sealed(folder / "evaluation.json", {"rows": [row | {"value": 0.25}]})
    with open(step_0 / "README.md", "a") as f:  # as it was published before
        f.write(f"\n{evaluation([row | {'value': 0.25}])}\n".replace("\n| task", "\n## Evaluation\n\n| task", 1))
    write_sealed(folder / "evaluation.json", {"rows": [row, row | {"step": 1, "value": 1.5}]})
    before = {path.name: path.read_bytes() for path in step_0.iterdir()}
    for words in ("making", "updating"):
        result = call(main, step_0, "--to", ME, "--language", "en", cwd=folder.parent)
        assert result.out.count(f"\n{words} {ME}") == 1
        assert "note: the card names no licence" in result.err
    text = hub.models[ME]["README.md"].decode()
    assert "# The card of step 0\n\n## Evaluation\n" in text
    assert "| t | acc | 0.5000 | 0.1250 |" in text
    assert "0.2500" not in text
    assert text.count("## Evaluation") == text.count("| t | acc |") == 1
    assert ModelCard(text).data.to_dict() == {"language": "en", "tags": ["gpt2"]}
    assert before == {path.name: path.read_bytes() for path in step_0.iterdir()}
    assert not hub.private[ME]


def test_a_dry_run_asks_nobody(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.publish, "get_token", lambda: None)
    result = publish(folder, "--dry-run", "--license", "mit")
    assert result.code == 0, result
    assert not hub.asked
    size = (folder / "checkpoints" / "step-1" / "model.safetensors").stat().st_size
    assert f"  model.safetensors {size:>26,} bytes\n" in result.out
    assert "license: mit\n" in result.out
    assert "optimizer.safetensors" not in result.out
    assert result.out.endswith(f"Nothing was sent. Without --dry-run this goes to {ME}.\n")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/a b", "me/..", "", "-me/x"])
def test_names_that_cannot_be(name: str, hub: Hub, folder: Path) -> None:
    refused(call(main, folder, f"--to={name}", cwd=folder.parent), "is no name that a model could have on the hub")
    assert not hub.asked


def test_what_is_refused_before_the_hub_is_asked(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(publish(folder, "--license", "MIT licence"), "--license MIT licence is no identifier of the hub")
    bare = save_model(folder.parent / "bare", CONFIG)
    refused(publish(bare), "bare has no README.md and is no checkpoint of a run; write a model card there first")
    (bare / "README.md").write_text("---\n- a\n---\n")
    refused(publish(bare), "the front matter of bare/README.md is damaged")
    missing = publish(folder.parent / "nowhere")
    assert missing.errors == ["error: there is no folder nowhere; pass the folder of a run or of a checkpoint"]
    weights = folder / "checkpoints" / "step-1" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    refused(publish(folder), "model.safetensors differs from what was written")
    weights.write_bytes(whole)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(data.publish, "get_token", lambda: None)
    refused(publish(folder, "--license", "mit"), "there is no token for the hub; log in with `hf auth login`")
    assert not hub.asked


def test_what_the_hub_refuses(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--license", "mit")
    hub.deny = 401
    refused(publish(folder, *given), "the hub does not accept this token; log in again with `hf auth login`")
    hub.deny = 403
    refused(publish(folder, *given), f"this token may not write to {ME}", "give another --to")
    hub.deny = 400
    refused(publish(folder, *given), f"the hub refuses {ME}")
    hub.deny, hub.writes = 0, []
    hub.models[ME], hub.private[ME] = {"README.md": b"", "mine.txt": b"", ".gitattributes": b""}, False
    refused(publish(folder, *given), f"{ME} has other files already ('mine.txt'); give another --to")
    del hub.models[ME]["mine.txt"]
    refused(publish(folder, *given, "--private"), f"{ME} is there already, and is public")
    assert not hub.writes
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(publish(folder, *given), f"the hub cannot be reached for {ME} (", "try again")
