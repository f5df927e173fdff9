"""A Program as people use it: running, instances, preparation, what the runtime asks of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dspex.core.errors import InvalidAssignment, InvalidInput, ProgramFailed
from dspex.core.program import Program
from dspex.core.schema import Schema
from dspex.core.types import Probability
from dspex.core.variables import computed, constraint, variable


class Shout(Program):
    """Say it
    loudly.

    Details.
    """

    class Input(Schema):
        text: str
        marks: int = variable(1, low=0, high=9)

    class Output(Schema):
        text: str

    suffix = variable("!", choices=["!", "?"])

    def predict(self, input: Input) -> Output:
        return self.Output(text=input.text.upper() + self.suffix * input.marks)


class Whisper(Shout):
    name = "hush"
    dots = variable(3, low=1, high=9)

    async def predict(self, input: Shout.Input) -> Shout.Output:  # type: ignore[override]
        await asyncio.sleep(0)
        return self.Output(text=input.text.lower() + "." * self.dots)


class Talk(Program):
    class Input(Schema):
        text: str

    class Output(Schema):
        text: str
        sure: Probability = 1.0

    voice = variable(Shout, choices=[Shout, Whisper])
    echo = Shout(suffix="?")
    times = variable(1, low=1, high=3)
    twice = computed(lambda times: 2 * times)

    async def predict(self, input: Input) -> Output:
        spoken = await self.voice.acall(text=input.text)
        return self.Output(text=spoken.text + self.echo(text=input.text).text)


def test_a_plain_program_runs_when_called() -> None:
    assert Shout()(text="hi").text == "HI!"
    assert Shout()(Shout.Input(text="hi", marks=2)).text == "HI!!"


def test_an_async_program_runs_when_called_and_when_awaited() -> None:
    assert Talk(voice=Whisper)(text="Hi").text == "hi...HI?"

    async def inside() -> str:
        assert (await Talk()(text="hi")).text == "HI!HI?"  # inside a loop a call gives something to await
        assert Shout()(text="hi").text == "HI!"
        text: str = (await Talk().acall(text="hi")).text
        return text

    assert asyncio.run(inside()) == "HI!HI?"


def test_a_plain_predict_is_awaited_in_a_thread() -> None:
    class Thread(Shout):
        def predict(self, input: Shout.Input) -> Shout.Output:
            return self.Output(text=threading.current_thread().name)

    name = asyncio.run(Thread().acall(text="")).text
    assert name != threading.current_thread().name


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(InvalidInput, match="text: a string is due, nothing came"):
        Shout()()
    with pytest.raises(InvalidInput, match="both came"):
        Shout()(Shout.Input(text="a"), text="b")
    with pytest.raises(
        InvalidInput, match=r"Shout\.Input is due, a Output came|Shout\.Input is due, an Output came"
    ):
        Shout()(Shout.Output(text="a"))


def test_values_are_set_by_name_by_class_by_instance_and_by_assignment() -> None:
    talk = Talk(voice=Whisper(dots=5), echo=Shout(suffix="!"), times=2)
    assert talk.assignment.to_json() == {
        "voice": "hush",
        "voice.hush.dots": 5,
        "voice.hush.suffix": "!",
        "voice.hush.input.marks": 1,
        "echo.suffix": "!",
        "echo.input.marks": 1,
        "times": 2,
    }
    assert (talk.voice.dots, talk.echo.suffix, talk.twice) == (5, "!", 4)  # type: ignore[attr-defined]
    assert Talk(assignment=talk.assignment).assignment == talk.assignment
    assert Talk(assignment=talk.assignment, times=3).times == 3
    assert Talk().echo.suffix == "?" and Talk.echo.suffix == "?"


def test_instances_share_no_sub_program() -> None:
    one, other = Talk(), Talk()
    assert one.echo is not other.echo and one.echo is not Talk.echo and one.voice is not other.voice


def test_what_a_template_was_made_with_is_kept() -> None:
    class Corpus(Shout):
        def __init__(self, words: list[str] | None = None, **values: object) -> None:
            super().__init__(**values)  # type: ignore[arg-type]
            self.words = words or []

    class Holder(Talk):
        corpus = Corpus(["a"], suffix="?")

    holder = Holder()
    assert holder.corpus.words == ["a"] and holder.corpus.suffix == "?"


def test_wrong_values_name_path_and_problem() -> None:
    with pytest.raises(InvalidAssignment, match="times = 4"):
        Talk(times=4)
    with pytest.raises(InvalidAssignment, match="did you mean times"):
        Talk(tims=2)
    with pytest.raises(InvalidAssignment, match=r"field of Input.*Talk\(\)\(text=…\)"):
        Talk(text="hi")


def test_an_instance_keeps_its_values() -> None:
    talk = Talk()
    for name in ("times", "voice", "echo", "twice"):
        with pytest.raises(AttributeError, match=rf"make a new one, Talk\({name}=…\)"):
            setattr(talk, name, 2)
    talk.note = "others are free"


def test_an_inactive_variable_reads_as_its_default() -> None:
    class Styled(Shout):
        style = variable("terse", choices=["terse", "full"])
        length = variable(10, low=1, high=99, when={"style": "full"})

    assert Styled().length == 10 and "length" not in Styled().assignment
    assert Styled(style="full", length=20).length == 20


def test_a_subclass_inherits_overrides_and_pins_variables() -> None:
    class Pinned(Whisper):
        suffix = "…"
        dots = variable(2, low=2, high=2)

    assert set(Pinned.space().variables) == {"dots", "input.marks"}
    assert Pinned.name == "pinned" and Whisper.name == "hush" and Pinned().dots == 2


def test_setup_runs_once_and_sub_programs_first() -> None:
    order: list[str] = []

    class Part(Shout):
        def setup(self) -> None:
            time.sleep(0.01)
            order.append("part")

    class Whole(Shout):
        part = Part()

        def setup(self) -> None:
            order.append("whole")

    whole = Whole()
    assert order == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: whole.prepare(), range(8)))
    whole(text="x")
    asyncio.run(whole.acall(text="x"))
    assert order == ["part", "whole"]


def test_a_setup_that_failed_is_tried_again() -> None:
    class Flaky(Shout):
        tries = 0

        def setup(self) -> None:
            self.tries += 1
            if self.tries == 1:
                raise OSError("not yet")

    flaky = Flaky()
    with pytest.raises(OSError, match="not yet"):
        flaky.prepare()
    flaky.prepare()
    flaky.prepare()
    assert flaky.tries == 2


def test_a_body_gets_the_values_of_the_assignment_where_it_says_nothing() -> None:
    tuned = Shout(assignment=Shout.space().assign({"input.marks": 5}))
    assert tuned.decode(b'{"text": "a"}').marks == 5
    assert tuned.decode(b'{"text": "a", "marks": 1}').marks == 1
    assert Shout().decode(b'{"text": "a"}').marks == 1
    assert tuned(text="a").text == "A!!!!!"
    with pytest.raises(InvalidInput):
        tuned.decode(b'{"text": 1}')


def test_without_such_values_decoding_is_the_schemas_own() -> None:
    assert Shout().decode == Shout.Input.decode
    assert (
        Shout().with_assignment(Shout.space().assign({"input.marks": 5})).decode(b'{"text": ""}').marks == 5
    )


def test_an_output_is_checked() -> None:
    talk = Talk()
    output = Talk.Output(text="a")
    assert talk.check_output(output) is output
    assert talk.check_output({"text": "a"}) == output
    assert talk.check_output(Shout.Output(text="a")) == output
    for value, words in (
        (None, "predict gave nothing, Talk.Output needs text, sure"),
        (7, "predict gave 7, Talk.Output needs"),
        ("my prompt", "predict gave a text of 9 characters"),
        ({"text": "a", "sure": 2}, "predict gave a dict that is no Talk.Output: sure: at most 1.0, 2 came"),
        (Shout.Input(text="a"), "predict gave a Input that is no Talk.Output: marks: no such field"),
    ):
        with pytest.raises(ProgramFailed) as caught:
            talk.check_output(value)
        assert words in str(caught.value)


def test_a_description_is_json_and_its_fingerprint_follows_name_and_schemas() -> None:
    described = Shout.describe()
    assert (described.name, described.doc) == ("shout", "Say it loudly.")
    assert described.input_schema["properties"]["marks"]["default"] == 1
    assert json.loads(json.dumps(described.variables)) == Shout.space().to_json()
    assert Shout.describe().fingerprint == described.fingerprint

    def made(kind: type) -> type[Program]:
        class Same(Program):
            class Input(Schema):
                x: kind  # type: ignore[valid-type]

            class Output(Schema):
                y: int

            def predict(self, input: Input) -> Output:
                return self.Output(y=1)

        return Same

    assert made(int).describe().fingerprint == made(int).describe().fingerprint
    assert made(int).describe().fingerprint != made(str).describe().fingerprint


def test_slots_follow_predict_unless_given() -> None:
    class Narrow(Shout):
        concurrency = 2
        timeout = 5

    assert (Shout.slots(), Whisper.slots(), Narrow.slots()) == (4, 256, 2)
    assert (Shout.is_async, Whisper.is_async, Shout.timeout, Shout.attempts) == (False, True, 300.0, 3)


def test_an_abstract_base_is_not_made() -> None:
    class Base(Program):
        k = variable(1, low=1, high=2)

    class Concrete(Base):
        class Input(Schema):
            x: int

        class Output(Schema):
            y: int

        def predict(self, input: Input) -> Output:
            return self.Output(y=self.k)

    with pytest.raises(TypeError, match="Base is abstract"):
        Base()
    assert Concrete()(x=1).y == 1


def test_a_rule_reaches_into_input_and_sub_programs() -> None:
    class Ruled(Shout):
        part = Whisper()
        rule = constraint(lambda marks, part__dots: marks < part__dots, "fewer marks than dots")

    assert Ruled.space().default()["part.dots"] == 3
    with pytest.raises(
        InvalidAssignment, match=r"input\.marks, part\.dots = \(5, 3\): fewer marks than dots"
    ):
        Ruled.space().assign({"input.marks": 5})


def test_an_own_init_that_forgets_super_is_told_so() -> None:
    class Forgetful(Shout):
        def __init__(self) -> None:
            pass

    with pytest.raises(AttributeError, match=r"super\(\).__init__"):
        _ = Forgetful().suffix
