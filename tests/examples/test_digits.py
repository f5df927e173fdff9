"""The digits example: four classifiers behind one variable, trained and asked for real."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dspex.compose.app import load_app
from dspex.core.errors import InvalidAssignment, InvalidInput

ROOT = Path(__file__).resolve().parents[2]
[Digits] = load_app(f"{ROOT}/examples/digits.py")
module = sys.modules[Digits.__module__]

CLASSIFIERS = ("logistic", "svm", "forest", "neighbours")


def accuracy(program: Any, count: int | None = None) -> float:
    scores: list[float] = [
        module.score(example, program(image=example["image"])) for example in islice(module.examples(), count)
    ]
    return sum(scores) / len(scores)


def test_the_file_serves_the_reader_and_not_its_classifiers() -> None:
    assert Digits.__name__ == "Digits"


def test_the_default_reads_95_of_100_held_out_images() -> None:
    assert accuracy(Digits()) >= 0.95


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_learns(name: str) -> None:
    assert accuracy(Digits(model=name), 200) > 0.9


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_only_the_chosen_classifiers_variables_are_active(name: str) -> None:
    paths = {path for path in Digits(model=name).assignment if path != "model"}
    assert paths
    assert all(path.startswith(f"model.{name}.") for path in paths)


def test_a_variable_of_another_classifier_is_refused() -> None:
    with pytest.raises(InvalidAssignment, match="needs model = 'neighbours'"):
        Digits.space().assign({"model": "svm", "model.neighbours.k": 3})


def test_gamma_needs_a_kernel_that_has_one() -> None:
    assert "model.svm.gamma" in Digits(model=module.SVM()).assignment
    assert "model.svm.gamma" not in Digits(model=module.SVM(kernel="linear")).assignment


def test_hyper_parameters_reach_the_classifier() -> None:
    assert accuracy(Digits(model=module.Forest(depth=2)), 200) < accuracy(Digits(model="forest"), 200) - 0.05


def test_training_twice_gives_the_same() -> None:
    [example] = islice(module.examples(), 1)
    first, second = (Digits(model="forest")(image=example["image"]) for _ in range(2))
    assert first == second


def test_the_digit_is_the_label_with_probabilities_for_all_ten() -> None:
    program = Digits(model="svm")
    for example in islice(module.examples(), 20):
        output = program(image=example["image"])
        assert str(output.digit) == output.probabilities.value
        assert set(output.probabilities.probabilities) == set("0123456789")


def test_what_it_gives_survives_the_wire() -> None:
    [example] = islice(module.examples(), 1)
    output = Digits()(image=example["image"])
    assert Digits.Output.decode(output.encode()) == output


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"image": 7}',
        b'{"image": []}',
        b'{"image": [%s]}' % b",".join([b"1"] * 65),
        b'{"image": [%s]}' % b",".join([b"17"] * 64),
        b'{"image": [%s]}' % b",".join([b"NaN"] * 64),
        b'{"image": [%s]}' % b",".join([b'"1"'] * 64),
    ],
)
def test_bad_input_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        Digits().decode(body)


def test_whole_numbers_are_taken_from_json() -> None:
    body = b'{"image": [%s]}' % b",".join([b"16"] * 64)
    assert Digits().decode(body).image == [16.0] * 64


def test_other_clients_find_its_schemas() -> None:
    image = Digits.describe().input_schema["properties"]["image"]
    assert (image["minItems"], image["maxItems"], image["items"]["maximum"]) == (64, 64, 16)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module.split.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'dspex\[examples\]'"):
        Digits()(image=[0.0] * 64)


def test_importing_the_file_loads_neither_scikit_learn_nor_numpy() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print({'sklearn', 'numpy'} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code, f"{ROOT}/examples/digits.py"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"
