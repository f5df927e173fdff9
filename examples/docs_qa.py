"""Answers questions from Markdown documents: the project's own, or those in the folder named by `DSPEX_DOCS`.

    python examples/docs_qa.py "What is a commit?"

No model, no network: a retriever finds passages, a reader picks the sentence that answers. Which retriever,
how long a passage, how much a heading counts: each is a variable; `score` over `examples()` judges a choice.
"""

import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from heapq import nlargest
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from dspex import Probability, Program, Schema, computed, variable

QUESTIONS = Path(__file__).with_name("docs_qa_questions.jsonl")

# What a question has whatever it is about.
STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be becomes been but by can could do does for from had has have how i if in into
        is it its may me mean means my no not of on or our say says should so than that the their them then
        there they this to was we were what when where which while who why will with would you your""",
    )
)


class Query(Schema):
    terms: list[str]
    count: int


class Ranking(Schema):
    passages: list[int]  # positions in what was indexed, best first


class Retriever(Program):
    """What the retrievers share, an inverted index; they differ in how much a term weighs in a passage."""

    postings: dict[str, list[tuple[int, float]]]

    def index(self, passages: list[list[str]], rarity: dict[str, float]) -> None:
        average = sum(map(len, passages)) / len(passages)
        self.postings = defaultdict(list)
        for position, terms in enumerate(passages):
            for term, weight in self.weights(Counter(terms), len(terms) / average, rarity).items():
                self.postings[term].append((position, weight))

    def weights(self, counts: Counter[str], length: float, rarity: dict[str, float]) -> dict[str, float]:
        raise NotImplementedError

    def best(self, query: Query) -> Ranking:
        scores: dict[int, float] = defaultdict(float)
        for term in query.terms:
            for position, weight in self.postings.get(term, ()):
                scores[position] += weight
        return Ranking(passages=nlargest(query.count, scores, key=scores.__getitem__))


class BM25(Retriever):
    """Robertson & Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009), section 3.4."""

    Input, Output = Query, Ranking

    k1 = variable(1.2, low=0.0, high=3.0, doc="how long repeating a term goes on to help")
    b = variable(0.75, low=0.0, high=1.0, doc="how much a long passage is held back")

    def weights(self, counts: Counter[str], length: float, rarity: dict[str, float]) -> dict[str, float]:
        damping = self.k1 * (1 - self.b + self.b * length)
        return {term: rarity[term] * n * (self.k1 + 1) / (n + damping) for term, n in counts.items()}

    def predict(self, input: Query) -> Ranking:
        return self.best(input)


class TFIDF(Retriever):
    """Cosine over tf-idf: Salton & Buckley, Term-Weighting Approaches in Automatic Text Retrieval (1988)."""

    Input, Output = Query, Ranking

    sublinear = variable(True, doc="count the logarithm of how often a term occurs")

    def weights(self, counts: Counter[str], length: float, rarity: dict[str, float]) -> dict[str, float]:
        times = {term: 1 + math.log(n) if self.sublinear else float(n) for term, n in counts.items()}
        norm = math.hypot(*(n * rarity[term] for term, n in times.items()))
        # Squared, because the term has its weight in the question as well as in the passage.
        return {term: n * rarity[term] ** 2 / norm for term, n in times.items()}

    def predict(self, input: Query) -> Ranking:
        return self.best(input)


class Sentence(NamedTuple):
    text: str
    terms: list[str]
    heading: list[str]  # the terms of the heading above it
    source: str


class QABot(Program):
    """Answer a question by quoting the documents, or the context that comes with it."""

    class Input(Schema):
        question: Annotated[str, Field(min_length=1, max_length=1_000)]
        context: Annotated[str, Field(max_length=200_000)] = ""

    class Output(Schema):
        answer: str
        confidence: Probability  # how much of the question, by rarity, the answer or its heading speaks of
        source: str  # file#heading

    retriever = variable(BM25, choices=[BM25, TFIDF])
    passages = variable(8, low=1, high=20, doc="how many passages are read")
    chunk = variable(100, low=20, high=200, step=20, doc="words in a passage")
    overlap = computed(lambda chunk: chunk // 4)  # words that a passage repeats of the one before
    letters = variable(6, low=3, high=12, doc="letters of a word that count: a stemmer in one number")
    heading = variable(0.5, low=0.0, high=1.0, doc="what a term is worth that only the heading has")
    nearness = variable(0.3, low=0.0, high=1.0, doc="what it is worth that terms stand close and early")
    definition = variable(0.5, low=0.0, high=1.0, doc="what it is worth that a sentence defines what is asked for")
    style = variable("terse", choices=["terse", "full"], doc="one sentence, or the next one too")

    def setup(self) -> None:
        self.corpus = [chunk for file, text in documents() for chunk in self.cut(self.read(text, file))]
        if not self.corpus:
            place = os.environ.get("DSPEX_DOCS", "the project")
            raise FileNotFoundError(f"{place} has no .md or .txt to answer from; check DSPEX_DOCS")
        found = [[*chunk[0].heading, *(term for s in chunk for term in s.terms)] for chunk in self.corpus]
        spread = Counter(term for terms in found for term in set(terms))
        self.rarity = {term: math.log(1 + (len(found) - n + 0.5) / (n + 0.5)) for term, n in spread.items()}
        self.unseen = math.log(2 * len(found) + 2)  # the same formula for n = 0
        self.retriever.index(found, self.rarity)

    # Plain, not async: this only computes, and in a thread it holds up nobody's heartbeat.
    def predict(self, input: Input) -> Output:
        wanted = list(dict.fromkeys(self.terms(input.question)))
        if input.context:
            chunks = [self.read(input.context, "context")]
        else:
            ranking = self.retriever(terms=wanted, count=self.passages)
            chunks = [self.corpus[position] for position in ranking.passages]
        candidates = [chunk[start : start + 2] for chunk in chunks for start in range(len(chunk))]
        best = max(candidates, key=lambda pair: self.judge(wanted, pair[0]), default=[])
        confidence = self.coverage(wanted, best[0], heading=1.0) if best else 0.0
        if not confidence:
            return self.Output(answer="", confidence=0.0, source="")
        quoted = best if self.style == "full" else best[:1]
        answer = " ".join(sentence.text for sentence in quoted)
        return self.Output(answer=answer, confidence=confidence, source=best[0].source)

    def judge(self, wanted: list[str], sentence: Sentence) -> float:
        """How well a sentence answers: what it covers, and whether that stands together and at its front."""
        places = [sentence.terms.index(term) for term in wanted if term in sentence.terms]
        # A definition names its subject first, so places count from the beginning.
        near = len(places) / (max(places) + 1) if places else 0.0
        # "Term: what it is" is what somebody hopes for who asks what the term is.
        subject, colon, _ = sentence.text.partition(":")
        defines = self.definition if colon and "`" not in subject and self.terms(subject) == wanted else 0.0
        return self.coverage(wanted, sentence, self.heading) + self.nearness * near + defines

    def coverage(self, wanted: list[str], sentence: Sentence, heading: float) -> float:
        """The share of the wanted terms, weighed by rarity, in the sentence or, for less, its heading."""
        said = total = 0.0
        for term in wanted:
            weight = self.rarity.get(term, self.unseen)
            total += weight
            said += weight if term in sentence.terms else weight * heading * (term in sentence.heading)
        return min(1.0, said / total) if total else 0.0

    def terms(self, text: str) -> list[str]:
        return [word[: self.letters] for word in re.findall(r"\w+", text.lower()) if word not in STOPWORDS]

    def read(self, text: str, file: str) -> list[Sentence]:
        """A document's sentences, each with the heading above it."""
        found: list[Sentence] = []
        heading = ""
        for block in blocks(text):
            if block.startswith("#"):
                heading = block.lstrip("# ")
                continue
            for sentence in re.split(r"(?<=[.!?]) (?=\W?[A-Z])", block):
                # What ends in a colon announces an answer and is none.
                if (terms := self.terms(sentence)) and not sentence.endswith(":"):
                    source = f"{file}#{heading}" if heading else file
                    found.append(Sentence(sentence, terms, self.terms(heading), source))
        return found

    def cut(self, sentences: list[Sentence]) -> Iterator[list[Sentence]]:
        """Passages of whole sentences and about `chunk` words, within one section, overlapping."""
        for _, section in groupby(sentences, key=lambda sentence: sentence.source):
            passage: list[Sentence] = []
            for sentence in section:
                if passage and words(*passage, sentence) > self.chunk:
                    yield passage
                    while words(*passage) > self.overlap:
                        passage = passage[1:]
                passage = [*passage, sentence]
            yield passage


def documents() -> Iterator[tuple[str, str]]:
    """File names and texts; of the project its pages only, not what else may lie in a clone."""
    named = os.environ.get("DSPEX_DOCS")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent
    patterns = ("**/*.md", "**/*.txt") if named else ("*.md", "docs/**/*.md")
    files = sorted({path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern)})
    for file in files:
        if not any(part.startswith(".") for part in file.parts) and (folder / file).is_file():
            yield file.as_posix(), (folder / file).read_text("utf-8", errors="replace")


def blocks(text: str) -> Iterator[str]:
    """Headings, paragraphs, list items and table rows, a line each; code is left out, it is not prose."""
    lines: list[str] = []
    code = False
    for line in [*(" ".join(line.split()) for line in text.splitlines()), ""]:
        fence = line.startswith(("```", "~~~"))
        begins = re.match(r"$|[-*+] |\d+\. |[#|<]", line) or fence
        if lines and (begins or lines[0].startswith("#")):
            yield unmarked(" ".join(lines))
            lines = []
        code ^= fence
        if line and not code and not fence:
            lines.append(line)


def unmarked(block: str) -> str:
    """Without the marks of Markdown; a table's cells are set apart by colons."""
    block = re.sub(r"!?\[([^][]*)\]\([^()]*\)|\*\*|^[-*+] |^\| *| *\|$", r"\1", block)
    return re.sub(r" *\| *", ": ", block)


def words(*sentences: Sentence) -> int:
    return sum(sentence.text.count(" ") + 1 for sentence in sentences)


def examples() -> list[dict[str, Any]]:
    """Labelled questions: `question`, `answer_contains` (any of these), `source`."""
    return [json.loads(line) for line in QUESTIONS.read_text("utf-8").splitlines()]


def score(example: dict[str, Any], output: QABot.Output) -> float:
    """1 when the answer holds the expected words, a quarter when only its file is the right one."""
    if any(words.lower() in output.answer.lower() for words in example["answer_contains"]):
        return 1.0
    return 0.25 if output.source.partition("#")[0] == example["source"] else 0.0


if __name__ == "__main__":
    bot = QABot()
    for question in sys.argv[1:] or [example["question"] for example in examples()[:5]]:
        reply = bot(question=question)
        print(f"{question}\n  {reply.answer}\n  {reply.source}, {reply.confidence:.0%} sure")
