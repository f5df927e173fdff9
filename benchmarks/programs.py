"""The program that the benchmarks serve: as small as a program can be, so that what is measured is dspex."""

from __future__ import annotations

from dspex import Program, Schema


class Echo(Program):
    """Give back what came."""

    class Input(Schema):
        text: str
        number: int = 0

    class Output(Schema):
        text: str

    async def predict(self, input: Input) -> Output:
        return self.Output(text=input.text)
