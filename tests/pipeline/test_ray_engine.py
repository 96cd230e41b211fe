"""Ray Data does what local processes do: the same bytes, nothing listening beyond this machine, no usage report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.errors import UserError
from pipeline.data.cleaning import CleaningSettings, clean_corpus
from pipeline.data.judging import Chunk, Judged, JudgePlan, Outcome, judge_chunk
from pipeline.data.ray_engine import decode_chunk, decode_judged, encode_chunk, encode_judged, map_on_ray
from pipeline.data.sources import Document

SCRIPT = """
import json, sys
from pathlib import Path
import psutil
from pipeline.data.cleaning import CleaningSettings, clean_corpus
from tests.pipeline.test_ray_engine import SETTINGS, documents
from dataclasses import replace

listening, flags = set(), set()

def look(done, text=""):
    if done > 4:
        return
    for process in psutil.Process().children(recursive=True):
        try:
            flags.add(process.environ().get("RAY_USAGE_STATS_ENABLED", "0"))
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.add(connection.laddr.ip.removeprefix("::ffff:"))
        except psutil.Error:
            pass

output = Path(sys.argv[1])
output.mkdir()
clean_corpus(documents(), output, replace(SETTINGS, engine="ray", workers=1), output / "checkpoint", look)
print(json.dumps([sorted(listening), sorted(flags), len(psutil.Process().children())]))
"""
SETTINGS = CleaningSettings(min_chars=10, held_out_modulus=3, near_duplicates=0.8, part_documents=40, chunk_documents=4)
OUTCOMES = st.builds(
    Outcome, st.text(), st.none() | st.text(), st.text(), st.none() | st.text(), st.binary(), st.binary(),
    st.booleans(), st.lists(st.text()).map(tuple), st.binary(), st.dictionaries(st.text(), st.integers(0, 9)),
)  # fmt: skip
DOCUMENTS = st.builds(
    Document,
    st.text(),
    st.text(st.characters()),
    st.none() | st.text(),
    st.lists(st.tuples(st.text(), st.text())).map(tuple),
)


def documents() -> list[Document]:
    texts = [" ".join(f"word{number * 100 + place}" for place in range(25)) for number in range(90)]
    texts[70:73] = [texts[0], texts[1] + " more", "short"]
    chat = Document("chat", "", None, (("user", "a question of mine"), ("assistant", "an answer 为你")))
    return [*(Document(f"source {number}", text) for number, text in enumerate(texts)), chat]


@settings(deadline=None)
@given(st.lists(DOCUMENTS, max_size=3).map(tuple), st.lists(OUTCOMES, max_size=3).map(tuple), st.text())
def test_what_travels_arrives(documents: tuple[Document, ...], outcomes: tuple[Outcome, ...], digest: str) -> None:
    assert decode_chunk(encode_chunk(Chunk(documents, digest))) == Chunk(documents, digest)
    assert decode_judged(encode_judged(Judged(outcomes, digest))) == Judged(outcomes, digest)


def test_outcomes_of_real_documents_travel() -> None:
    judged = judge_chunk(JudgePlan(SETTINGS), Chunk(tuple(documents()), "digest"))
    assert decode_judged(encode_judged(judged)) == judged


@pytest.mark.slow
def test_ray_writes_the_same_bytes_and_stays_on_this_machine(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("RAY_ADDRESS", None)
    output = tmp_path / "ray"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(output)], capture_output=True, text=True, env=environment, timeout=240,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listening, flags, left = json.loads(done.stdout.splitlines()[-1])
    assert set(listening) <= {"127.0.0.1", "::1"} and listening
    assert flags == ["0"] and left == 0
    local = tmp_path / "local"
    local.mkdir()
    report = clean_corpus(documents(), local, SETTINGS, tmp_path / "checkpoint")
    assert report.dropped == {"duplicate": 1, "near_duplicate": 1, "too_short": 1}
    for side in ("train", "held_out"):
        assert (output / f"{side}.jsonl").read_bytes() == (local / f"{side}.jsonl").read_bytes()


def test_a_missing_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")  # leaves the environment of this process alone
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(
        UserError, match=r"^data.engine: got 'ray', allowed: an installed Ray; pip install '.\[cluster\]'"
    ):
        list(map_on_ray(lambda chunk: Judged((), ""), [Chunk((), "")], 1))
