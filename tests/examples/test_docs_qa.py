"""The question answering example, on the project's own pages and on a folder that the user names."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspex.compose.app import load_app
from dspex.core.errors import InvalidAssignment, InvalidInput

ROOT = Path(__file__).resolve().parents[2]
[QABot] = load_app(f"{ROOT}/examples/docs_qa.py")
qa = sys.modules[QABot.__module__]


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two pages that the questions are about, without those that change with the project."""
    (tmp_path / "docs").mkdir()
    for name in ("words.md", "faq.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    monkeypatch.setenv("DSPEX_DOCS", str(tmp_path))
    return tmp_path


def accuracy(bot: Any) -> float:
    scores = [qa.score(example, bot(question=example["question"])) for example in qa.examples()]
    return scores.count(1.0) / len(scores)


def test_the_file_serves_the_bot_and_not_its_parts() -> None:
    assert QABot.__name__ == "QABot"
    assert QABot.name == "qabot"


def test_the_defaults_answer_most_questions(pages: Path) -> None:
    assert accuracy(QABot()) > 0.8


def test_the_defaults_answer_most_questions_from_all_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPEX_DOCS", raising=False)
    assert accuracy(QABot()) > 0.6


def test_a_setting_matters(pages: Path) -> None:
    assert accuracy(QABot(nearness=0.0)) < accuracy(QABot()) - 0.05


def test_the_chosen_retriever_decides_which_variables_are_active() -> None:
    assert set(QABot().assignment) - set(QABot(retriever=qa.TFIDF).assignment) == {
        "retriever.bm25.k1",
        "retriever.bm25.b",
    }
    with pytest.raises(InvalidAssignment, match="not active: it needs retriever = 'bm25'"):
        QABot.space().assign({"retriever": "tfidf", "retriever.bm25.k1": 2.0})


def test_the_chosen_retriever_decides_what_is_found(pages: Path) -> None:
    questions = [example["question"] for example in qa.examples()]
    bots = [QABot(retriever=retriever, passages=1, chunk=20) for retriever in (qa.BM25, qa.TFIDF)]
    first, second = ([bot(question=question).answer for question in questions] for bot in bots)
    assert first != second


def test_an_answer_names_its_file_and_heading(pages: Path) -> None:
    output = QABot()(question="What does exit code 3 mean?")
    assert output.answer == "Exit code 3 means that there was no connection to NATS."
    assert output.source == "docs/faq.md#Which exit codes do the commands have?"


def test_full_style_goes_on_after_the_sentence(pages: Path) -> None:
    terse, full = (
        QABot(style=style)(question="What does exit code 1 mean?").answer for style in ("terse", "full")
    )
    assert full.startswith(terse)
    assert len(full) > len(terse)


def test_confidence_is_higher_for_right_answers_and_zero_for_nothing(pages: Path) -> None:
    bot = QABot()
    right: list[float] = []
    wrong: list[float] = []
    for example in qa.examples():
        output = bot(question=example["question"])
        (right if qa.score(example, output) == 1 else wrong).append(output.confidence)
    assert sum(right) / len(right) > sum(wrong) / len(wrong)
    for question in ("zebra quagga?", "what is it?", "?!"):
        assert bot(question=question) == qa.QABot.Output(answer="", confidence=0.0, source="")


def test_context_is_read_instead_of_the_documents(pages: Path) -> None:
    context = "# Menu\nTea is served at four. A commit costs two cakes.\n```\na commit in code\n```\n"
    output = QABot()(question="What is a commit?", context=context)
    assert output.answer == "A commit costs two cakes."
    assert output.source == "context#Menu"


def test_tables_and_links_are_read_as_text(pages: Path) -> None:
    context = "| word | meaning |\n|---|---|\n| **falcon** | a [fast](https://x.org) bird |\n"
    assert QABot()(question="falcon?", context=context).answer == "falcon: a fast bird"


def test_a_folder_is_read_with_its_subfolders_and_without_hidden_ones(pages: Path) -> None:
    (pages / "deep" / "er").mkdir(parents=True)
    (pages / "deep" / "er" / "birds.txt").write_bytes(b"The falcon \xff dives at 300 km/h.")
    (pages / ".git").mkdir()
    (pages / ".git" / "x.md").write_text("The falcon is hidden.")
    assert QABot()(question="How does the falcon dive?").source == "deep/er/birds.txt"


@pytest.mark.parametrize("text", [None, "", "# Only a heading\n"])
def test_a_folder_without_text_is_one_clear_sentence(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "a.md").write_text(text)
    monkeypatch.setenv("DSPEX_DOCS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no \.md or \.txt .* DSPEX_DOCS"):
        QABot()(question="anything")


@pytest.mark.parametrize(
    "body",
    [
        b'{"question": ""}',
        b'{"question": 5}',
        b"{}",
        b'{"question": "x", "answer": "y"}',
        b'{"question": "%s"}' % (b"x" * 1001),
    ],
)
def test_bad_input_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        QABot().decode(body)


HOSTILE: list[Callable[[int], str]] = [
    lambda n: "[" * n,
    lambda n: "[](" * (n // 3),
    lambda n: "x" + " " * (n - 2) + "|",
    lambda n: "```\n" * (n // 4),
    lambda n: "<!--" * (n // 4),
    lambda n: "a\n" * (n // 2),
    lambda n: "Cat! " * (n // 5),
    lambda n: "cat " * (n // 4),
]


@pytest.mark.parametrize("make", HOSTILE)
def test_no_context_takes_long(pages: Path, make: Callable[[int], str]) -> None:
    bot = QABot()
    bot.prepare()
    began = time.process_time()
    bot(question="What is a commit?", context=make(199_999))
    assert time.process_time() - began < 60  # quadratic ones took many minutes


async def test_it_answers_inside_an_event_loop(pages: Path) -> None:
    output = await QABot().acall(question="What is a commit?")
    assert "one atomic append" in output.answer


def test_other_clients_find_its_schemas() -> None:
    described = QABot.describe()
    assert described.input_schema["properties"]["question"]["minLength"] == 1
    assert set(described.output_schema["required"]) == {"answer", "confidence", "source"}
