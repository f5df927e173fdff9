"""Reads handwritten digits: scikit-learn's bundled images, and a classifier that is itself a variable.

    python examples/digits.py

Four classifiers, each a program with hyper-parameters of its own; `Digits.model` chooses one, and only the
chosen one's are active. Nothing here knows about NATS: `dspex up examples/digits.py` makes it a service.
"""

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from dspex import Label, Program, Schema, variable

Pixel = Annotated[float, Field(ge=0, le=16)]


class Image(Schema):
    image: Annotated[list[Pixel], Field(min_length=64, max_length=64)]  # 8 rows of 8; 0 is paper, 16 is ink


class Guess(Schema):
    label: Label


class Classifier(Program):
    """What the classifiers share; they differ in the estimator and in what can be tuned about it."""

    fitted: Any

    def estimator(self) -> Any:
        raise NotImplementedError

    def setup(self) -> None:
        images, _, digits, _ = split()
        from threadpoolctl import threadpool_limits

        # An agent is one core's work. Threads of the linear algebra would fight over images this small:
        # with one the default trains twenty times as fast.
        threadpool_limits(1)
        self.fitted = self.estimator().fit(images, digits)

    def guess(self, input: Image) -> Guess:
        [weights] = self.fitted.predict_proba([input.image])
        names = map(str, self.fitted.classes_)
        return Guess(label=Label.of(dict(zip(names, weights, strict=True))))


# scikit-learn takes a second to import, so that happens in `setup`: a process that only looks at these
# classes, as the command line does, doesn't pay for it.
class Logistic(Classifier):
    """Multinomial logistic regression."""

    Input, Output = Image, Guess

    C = variable(1.0, low=0.001, high=100.0, log=True, doc="inverse of the regularization")

    def estimator(self) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=2000))

    def predict(self, input: Image) -> Guess:
        return self.guess(input)


class SVM(Classifier):
    """A support vector machine; its margins become probabilities by Platt scaling."""

    Input, Output = Image, Guess

    C = variable(10.0, low=0.1, high=1000.0, log=True, doc="inverse of the regularization")
    kernel = variable("rbf", choices=["rbf", "poly", "linear"])
    gamma = variable(0.001, low=1e-5, high=0.1, log=True, when={"kernel": ["rbf", "poly"]})
    degree = variable(3, low=2, high=5, when={"kernel": "poly"})

    def estimator(self) -> Any:
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import SVC

        machine = SVC(C=self.C, kernel=self.kernel, gamma=self.gamma, degree=self.degree)
        return CalibratedClassifierCV(machine, ensemble=False, cv=3)

    def predict(self, input: Image) -> Guess:
        return self.guess(input)


class Forest(Classifier):
    """A random forest: Breiman, Random Forests (2001)."""

    Input, Output = Image, Guess

    trees = variable(100, low=10, high=300, log=True)
    depth = variable(12, low=2, high=20)
    features = variable("sqrt", choices=["sqrt", "log2"], doc="how many pixels a split may look at")

    def estimator(self) -> Any:
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(
            n_estimators=self.trees, max_depth=self.depth, max_features=self.features, random_state=0
        )

    def predict(self, input: Image) -> Guess:
        return self.guess(input)


class Neighbours(Classifier):
    """The k nearest neighbours vote."""

    Input, Output = Image, Guess

    k = variable(5, low=1, high=30)
    weights = variable("uniform", choices=["uniform", "distance"], doc="whether the nearer ones count more")
    p = variable(2.0, low=1.0, high=4.0, doc="of the Minkowski distance: 1 is Manhattan, 2 is Euclid")

    def estimator(self) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(self.k, weights=self.weights, p=self.p)

    def predict(self, input: Image) -> Guess:
        return self.guess(input)


class Digits(Program):
    """Read a handwritten digit from an image of 8 by 8 pixels."""

    # A prediction is CPU work under Python's lock: more at once would only wait for each other.
    concurrency = 2

    Input = Image

    class Output(Schema):
        digit: Annotated[int, Field(ge=0, le=9)]
        probabilities: Label

    model = variable(Logistic, choices=[Logistic, SVM, Forest, Neighbours])

    def predict(self, input: Image) -> Output:
        label = self.model(input).label
        return self.Output(digit=int(label.value), probabilities=label)


@cache
def split() -> tuple[Any, Any, Any, Any]:
    """Images for training and held out, then their digits: 1257 and 540, the same in every process."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ImportError("the digits need scikit-learn: pip install 'dspex[examples]'") from error
    images, digits = load_digits(return_X_y=True)
    parts: tuple[Any, Any, Any, Any] = train_test_split(
        images, digits, test_size=0.3, random_state=0, stratify=digits
    )
    return parts


def examples() -> Iterator[dict[str, Any]]:
    """Images that no classifier was trained on: `image`, `digit`."""
    _, images, _, digits = split()
    for image, digit in zip(images.tolist(), digits.tolist(), strict=True):
        yield {"image": image, "digit": digit}


def score(example: dict[str, Any], output: Digits.Output) -> float:
    """1 for the right digit, else 0."""
    return float(output.digit == example["digit"])


if __name__ == "__main__":
    for model in (Logistic, SVM, Forest, Neighbours):
        program = Digits(model=model)
        scores = [score(example, program(image=example["image"])) for example in examples()]
        print(f"{model.name:>10}  {sum(scores) / len(scores):.1%} of {len(scores)} held-out images")
