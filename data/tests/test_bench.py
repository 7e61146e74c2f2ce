import json
import sys
from itertools import islice
from pathlib import Path

import pytest

from data import bench
from data.sources import stream
from data.stories import stories


def test_the_text_is_of_new_documents(tmp_path: Path) -> None:
    material = list(islice(stories(0), 100))
    path = tmp_path / "text.txt"
    bench.write_text(path, 300_000, material)
    assert 300_000 <= path.stat().st_size < 302_000
    text = stream(str(path), "train")
    assert text
    documents = [document for group, _ in text.documents() for document in group]
    assert len(set(documents)) > 0.95 * len(documents)
    average = sum(map(len, material)) / len(material)
    assert sum(map(len, documents)) / len(documents) == pytest.approx(average, rel=0.2)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda size, material: measure(300_000, material))
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "found.json")])
    bench.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(value > 0 for value in found.values())
    assert f"{found['prepare_over_tiktoken_times_cores']:.2f} x tiktoken x cores" in capsys.readouterr().out
