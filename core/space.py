"""`Space`, all variables of a program by path, and `Assignment`, one value for every active one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import msgspec

from dspex.core.declare import did_you_mean
from dspex.core.errors import InvalidAssignment
from dspex.core.variables import Condition, JsonScalar, Variable


def canonical(value: object) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8. Hashes are taken over it."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


class Assignment:
    """One value for every active variable: immutable, equal by content, named by its hash.

    It reads like a mapping of paths (`assignment["passages"]`, `len`, `in`, `items()`, `dict(assignment)`),
    but `values` is the read-only mapping itself. A Space makes it, so its values are in their normal form.
    """

    __slots__ = ("_hash", "_values")

    _values: Mapping[str, JsonScalar]
    _hash: str

    def __init__(self, values: Mapping[str, JsonScalar]) -> None:
        object.__setattr__(self, "_values", MappingProxyType(dict(values)))

    @property
    def values(self) -> Mapping[str, JsonScalar]:
        """Path to value."""
        return self._values

    @property
    def hash(self) -> str:
        """The first 32 hex digits of the SHA-256 of the canonical JSON of the values."""
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hashlib.sha256(canonical(dict(self._values))).hexdigest()[:32])
            return self._hash

    def to_json(self) -> dict[str, JsonScalar]:
        """The values as a plain dict, in the order of their paths."""
        return {path: self._values[path] for path in sorted(self._values)}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Assignment:
        """From what `to_json` gave; raises InvalidAssignment for what is no JSON scalar."""
        found: dict[str, JsonScalar] = {}
        for path, value in values.items():
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise InvalidAssignment(path, value, "null, true, false, a number or a string is due")
            found[path] = value
        return cls(found)

    def part(self, prefix: str) -> Assignment:
        """The values whose paths begin with `prefix`, under the rest of their paths."""
        return Assignment({p[len(prefix) :]: v for p, v in self._values.items() if p.startswith(prefix)})

    def __getitem__(self, path: str) -> JsonScalar:
        return self._values[path]

    def __contains__(self, path: object) -> bool:
        return path in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def keys(self) -> Collection[str]:
        """The paths."""
        return self._values.keys()

    def items(self) -> Collection[tuple[str, JsonScalar]]:
        """The paths with their values."""
        return self._values.items()

    def get(self, path: str, default: JsonScalar = None) -> JsonScalar:
        """The value at a path, or the default."""
        return self._values.get(path, default)

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, Assignment) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an Assignment is immutable: make another one with space.assign")

    def __reduce__(self) -> tuple[object, ...]:
        return (Assignment, (dict(self._values),))

    def __repr__(self) -> str:
        return f"Assignment({self.to_json()!r})"


@dataclass(frozen=True)
class Computed:
    """A value at `path` that `rule` derives from the values at `inputs`."""

    path: str
    inputs: tuple[str, ...]
    rule: Callable[..., object]


@dataclass(frozen=True)
class Constraint:
    """What must hold between the values at `inputs`, once all of them are active."""

    path: str
    inputs: tuple[str, ...]
    rule: Callable[..., object]
    message: str

    def check(self, values: Mapping[str, object]) -> None:
        """Raise InvalidAssignment when it doesn't hold."""
        found = [values[path] for path in self.inputs]
        place = ", ".join(self.inputs)
        shown = found[0] if len(found) == 1 else tuple(found)
        if not _applied(lambda *inputs: bool(self.rule(*inputs)), found, place, shown):
            raise InvalidAssignment(place, shown, self.message or f"the constraint {self.path} does not hold")


class Space:
    """All variables of a program by path, parents before children, with what is computed and what must hold.

    `passages` is the program's own, `input.temperature` a field's, `reader.k` a sub-program's, and
    `retriever.bm25.k1` belongs to a program that the variable `retriever` may choose.
    """

    def __init__(
        self,
        variables: Mapping[str, Variable],
        computed: Sequence[Computed] = (),
        constraints: Sequence[Constraint] = (),
    ) -> None:
        # A part of a larger space also has conditions on paths outside it; they are that space's to order.
        parents = {
            path: [c.path for c in variable.when if c.path in variables]
            for path, variable in variables.items()
        }
        self.variables: Mapping[str, Variable] = MappingProxyType(
            {path: variables[path] for path in ordered(parents)}
        )
        by_path = {value.path: value for value in computed}
        links = {path: [p for p in value.inputs if p in by_path] for path, value in by_path.items()}
        self.computed: tuple[Computed, ...] = tuple(by_path[path] for path in ordered(links))
        self.constraints: tuple[Constraint, ...] = tuple(constraints)
        self.defaults: Mapping[str, JsonScalar] = MappingProxyType(
            {path: variable.default for path, variable in self.variables.items()}
        )

    def __repr__(self) -> str:
        return f"Space({', '.join(self.variables)})"

    @cached_property
    def _default(self) -> Assignment:
        return self.assign({}, base=Assignment({}))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of the space's JSON: equal for spaces that admit the same paths and values."""
        return hashlib.sha256(canonical(self.to_json())).hexdigest()

    def default(self) -> Assignment:
        """Every active variable at its default."""
        return self._default

    def assign(self, values: Mapping[str, object], base: Assignment | None = None) -> Assignment:
        """`base` (or the default) with `values` set, newly active variables completed, inactive ones dropped.

        Raises InvalidAssignment with path, value and problem: an unknown path, a value outside its variable,
        a variable that is not active, a constraint that does not hold.
        """
        start = self.default() if base is None else base
        wanted = {path: self._validated(path, value) for path, value in start.items()}
        chosen = {path: self._validated(path, value) for path, value in values.items()}
        wanted.update(chosen)
        found = self._completed(wanted)
        for path in chosen:
            if path not in found:
                needed = next(c for c in self.variables[path].when if not c.holds(found))
                raise InvalidAssignment(path, values[path], f"it is not active: it needs {needed}")
        self._check(found)
        return Assignment(found)

    def active(self, values: Mapping[str, object]) -> frozenset[str]:
        """The paths that are active under these values; what is not given has its default."""
        return frozenset(
            self._completed({path: self._validated(path, value) for path, value in values.items()})
        )

    def resolve(self, assignment: Assignment) -> dict[str, object]:
        """The active values with the computed ones whose inputs are all active."""
        return self.evaluate(assignment.values)

    def evaluate(self, values: Mapping[str, JsonScalar]) -> dict[str, object]:
        """The values and all that can be computed from them; raises InvalidAssignment if a rule fails."""
        found: dict[str, object] = dict(values)
        for value in self.computed:
            if all(path in found for path in value.inputs):
                inputs = [found[path] for path in value.inputs]
                found[value.path] = _applied(value.rule, inputs, value.path, tuple(inputs))
        return found

    def to_json(self) -> dict[str, object]:
        """Plain JSON: variables by path, computed paths with their inputs, constraints with their words."""
        return {
            "variables": {path: variable.to_json() for path, variable in self.variables.items()},
            "computed": {value.path: list(value.inputs) for value in self.computed},
            "constraints": [
                {"paths": list(rule.inputs), "message": rule.message} for rule in self.constraints
            ],
        }

    def under(self, prefix: str, when: tuple[Condition, ...], defaults: Assignment | None = None) -> Space:
        """This space as a part of another: paths behind `prefix`, active under `when`, own defaults."""
        variables: dict[str, Variable] = {}
        for path, variable in self.variables.items():
            conditions = tuple(Condition(prefix + c.path, c.values) for c in variable.when)
            default = defaults[path] if defaults is not None and path in defaults else variable.default
            variables[prefix + path] = msgspec.structs.replace(
                variable, default=default, when=when + conditions
            )
        computed = [Computed(prefix + c.path, _behind(prefix, c.inputs), c.rule) for c in self.computed]
        rules = [
            Constraint(prefix + c.path, _behind(prefix, c.inputs), c.rule, c.message)
            for c in self.constraints
        ]
        return Space(variables, computed, rules)

    def _validated(self, path: str, value: object) -> JsonScalar:
        variable = self.variables.get(path)
        if variable is None:
            raise InvalidAssignment(path, value, self._unknown(path))
        try:
            return variable.validate(value)
        except ValueError as error:
            raise InvalidAssignment(path, value, str(error)) from None

    def _unknown(self, path: str) -> str:
        for value in self.computed:
            if value.path == path:
                return f"it is computed, set {', '.join(value.inputs)}"
        return f"no such variable, {did_you_mean(path, iter(self.variables))}"

    def _completed(self, wanted: Mapping[str, JsonScalar]) -> dict[str, JsonScalar]:
        # Parents come first in self.variables, so one pass decides what is active.
        found: dict[str, JsonScalar] = {}
        for path, variable in self.variables.items():
            if all(condition.holds(found) for condition in variable.when):
                found[path] = wanted.get(path, variable.default)
        return found

    def _check(self, values: Mapping[str, JsonScalar]) -> None:
        if not self.computed and not self.constraints:
            return
        resolved = self.evaluate(values)
        for rule in self.constraints:
            if all(path in resolved for path in rule.inputs):
                rule.check(resolved)


class Cycle(Exception):
    """Names that wait for each other; `names` begins and ends with the same one."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        super().__init__(" -> ".join(names))


def ordered(parents: Mapping[str, Iterable[str]]) -> list[str]:
    """Every name after its parents, otherwise in the order given; raises Cycle."""
    done: dict[str, None] = {}

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            raise Cycle([*trail[trail.index(name) :], name])
        if name not in done:
            for parent in parents[name]:
                visit(parent, [*trail, name])
            done[name] = None

    for name in parents:
        visit(name, [])
    return list(done)


def _behind(prefix: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + path for path in paths)


def _applied(rule: Callable[..., object], inputs: Sequence[object], place: str, shown: object) -> object:
    try:
        return rule(*inputs)
    except Exception as error:
        # A rule is the user's code: whatever it raises means that these values don't work.
        raise InvalidAssignment(place, shown, f"the rule raised {type(error).__name__}: {error}") from error
