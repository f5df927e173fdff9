"""What a Program class means: its variables, sub-programs and rules, checked when the class is defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from dspex.core.declare import build, did_you_mean, is_program, shown_name
from dspex.core.errors import DefinitionError, InvalidAssignment
from dspex.core.schema import Schema, field_declarations, field_variables
from dspex.core.space import Computed, Constraint, Cycle, Space, ordered
from dspex.core.variables import (
    ComputedDeclaration,
    Condition,
    ConstraintDeclaration,
    Declaration,
    JsonScalar,
    Module,
    Variable,
)


@dataclass(frozen=True)
class Definition:
    """A checked Program class.

    `plain` are its own variables that hold a value, `modules` those that choose a program, `templates` the
    sub-programs in its body, `computed` its own computed values, `fields` the variables among Input's fields.
    """

    space: Space
    plain: tuple[str, ...]
    modules: Mapping[str, Module]
    templates: Mapping[str, object]
    computed: tuple[str, ...]
    fields: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        """The attributes that are fixed when an instance is made."""
        return frozenset((*self.plain, *self.modules, *self.templates, *self.computed))


def define(cls: type, root: type, schema: type[Schema] | None) -> Definition:
    """Collect and check what the class body (and its bases up to `root`) declares; raises DefinitionError."""
    return _Builder(cls, root, schema).build()


class _Builder:
    def __init__(self, cls: type, root: type, schema: type[Schema] | None) -> None:
        self.cls, self.owner, self.schema = cls, shown_name(cls), schema
        members = _members(cls, root)
        self.declared = {n: v for n, v in members.items() if isinstance(v, Declaration)}
        self.rules = {n: v for n, v in members.items() if isinstance(v, ComputedDeclaration)}
        self.constraints = {n: v for n, v in members.items() if isinstance(v, ConstraintDeclaration)}
        self.templates = {n: v for n, v in members.items() if is_program(type(v))}
        self.variables: dict[str, Variable] = {}
        self.computed: list[Computed] = []
        self.inherited_rules: list[Constraint] = []
        taken = {*dir(root), *inspect.get_annotations(root), "input"}
        for name in (*self.declared, *self.rules, *self.constraints, *self.templates):
            if name in taken:
                self.refuse(name, name, "Program itself uses this name", "rename the attribute")

    def refuse(self, field: str, value: object, problem: str, remedy: str) -> NoReturn:
        raise DefinitionError(self.owner, field, value, problem, remedy)

    def build(self) -> Definition:
        modules = self.add_own_variables()
        self.add_templates()
        fields = self.add_fields()
        conditions = self.conditions()
        self.check_cycles(conditions)
        for path, found in conditions.items():
            self.variables[path] = msgspec.structs.replace(self.variables[path], when=found)
        own_computed = self.add_computed()
        rules = [self.constraint(name, declared) for name, declared in self.constraints.items()]
        space = Space(self.variables, self.computed, [*self.inherited_rules, *rules])
        self.check_defaults(space, own_computed, rules)
        plain = tuple(name for name in self.declared if name not in modules)
        return Definition(space, plain, modules, self.templates, tuple(self.rules), fields)

    def add_own_variables(self) -> dict[str, Module]:
        modules: dict[str, Module] = {}
        for name, declared in self.declared.items():
            variable = build(self.owner, name, declared)
            self.variables[name] = variable
            if isinstance(variable, Module):
                modules[name] = variable
                for choice, program in zip(variable.choices, variable.programs, strict=True):
                    condition = Condition(name, (choice,))
                    self.add_part(_space_of(program).under(f"{name}.{choice}.", (condition,)))
        return modules

    def add_templates(self) -> None:
        for name, template in self.templates.items():
            assignment = getattr(template, "assignment", None)
            self.add_part(_space_of(type(template)).under(f"{name}.", (), assignment))

    def add_part(self, part: Space) -> None:
        self.variables.update(part.variables)
        self.computed.extend(part.computed)
        self.inherited_rules.extend(part.constraints)

    def add_fields(self) -> tuple[str, ...]:
        if self.schema is None:
            return ()
        found = field_variables(self.schema)
        self.variables.update({f"input.{name}": variable for name, variable in found.items()})
        return tuple(found)

    def conditions(self) -> dict[str, tuple[Condition, ...]]:
        declared = {name: (name, value) for name, value in self.declared.items()}
        if self.schema is not None:
            fields = field_declarations(self.schema)
            declared |= {f"input.{name}": (f"input.{name}", value) for name, value in fields.items()}
        return {
            path: tuple(self.condition(path, value, name) for name in value.when)
            for path, (path, value) in declared.items()
            if value.when is not None
        }

    def condition(self, path: str, declared: Declaration, name: str) -> Condition:
        assert declared.when is not None
        when = dict(declared.when)
        parent = self.path_of(name, "input." if path.startswith("input.") else "")
        if parent is None:
            problem = (
                f"`when` names {name!r}, which is no variable: {did_you_mean(name, iter(self.variables))}"
            )
            self.refuse(path, when, problem, "name a variable of this program in `when`")
        if parent not in self.variables:
            remedy = "name a variable in `when`, not a computed value"
            self.refuse(path, when, f"`when` names {parent}, which is computed", remedy)
        given = when[name]
        wanted = list(given) if isinstance(given, (list, tuple, set, frozenset)) else [given]
        if not wanted:
            self.refuse(path, when, f"`when` gives {name} no value", "name at least one value")
        values: list[JsonScalar] = []
        for value in wanted:
            try:
                values.append(self.variables[parent].validate(value))
            except ValueError as error:
                problem = f"{name} can never be {value!r}: {error}"
                self.refuse(path, when, problem, "name a value that the parent can have")
        return Condition(parent, tuple(values))

    def path_of(self, name: str, first: str = "") -> str | None:
        """The path that a name means: an own variable, else a field of Input, else `a__b` for `a.b`."""
        computed = {value.path for value in self.computed} | set(self.rules)
        for path in (first + name, name, f"input.{name}", name.replace("__", ".")):
            if path in self.variables or (not first and path in computed):
                return path
        return None

    def check_cycles(self, conditions: Mapping[str, tuple[Condition, ...]]) -> None:
        parents = {p: [c.path for c in (*v.when, *conditions.get(p, ()))] for p, v in self.variables.items()}
        try:
            ordered(parents)
        except Cycle as cycle:
            problem = f"the conditions go in a circle: {cycle}"
            self.refuse(cycle.names[0], " -> ".join(cycle.names), problem, "drop one `when` of the circle")

    def add_computed(self) -> list[Computed]:
        own = [
            Computed(name, tuple(self.inputs(name, declared.rule, "computed")), declared.rule)
            for name, declared in self.rules.items()
        ]
        for value in own:
            if not value.inputs:
                problem = "the rule has no parameters, so it is computed from nothing"
                self.refuse(
                    value.path,
                    value.rule,
                    problem,
                    "name variables as its parameters, or write a plain value",
                )
        names = {value.path for value in own}
        try:
            ordered({value.path: [path for path in value.inputs if path in names] for value in own})
        except Cycle as cycle:
            problem = f"the computed values go in a circle: {cycle}"
            self.refuse(
                cycle.names[0], " -> ".join(cycle.names), problem, "compute one of them from variables only"
            )
        self.computed.extend(own)
        return own

    def constraint(self, name: str, declared: ConstraintDeclaration) -> Constraint:
        inputs = tuple(self.inputs(name, declared.rule, "constraint"))
        if not inputs:
            problem = "the rule has no parameters, so it constrains nothing"
            self.refuse(name, declared.rule, problem, "name variables as its parameters")
        return Constraint(name, inputs, declared.rule, declared.message)

    def inputs(self, field: str, rule: Callable[..., object], what: str) -> Iterator[str]:
        try:
            parameters = inspect.signature(rule).parameters
        except (TypeError, ValueError):
            self.refuse(
                field, rule, f"the rule of a {what} has no readable parameters", "give a lambda or a function"
            )
        for parameter in parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                remedy = "name every variable as a plain parameter"
                self.refuse(
                    field, str(parameter), f"the rule of a {what} takes plain parameters only", remedy
                )
            path = self.path_of(parameter.name)
            if path is not None:
                yield path
            elif parameter.default is parameter.empty:
                known = [*self.variables, *self.rules]
                hint = did_you_mean(parameter.name, known)
                problem = f"the rule names {parameter.name!r}, which is no variable: {hint}"
                self.refuse(field, parameter.name, problem, "name its parameters after variables")

    def check_defaults(self, space: Space, own: list[Computed], rules: list[Constraint]) -> None:
        # Over all defaults, active or not: any of them becomes active with this very default.
        for value in own:
            self.check_rule(value.path, lambda: space.evaluate(space.defaults))
        resolved = space.evaluate(space.defaults)
        for rule in rules:
            self.check_rule(rule.path, lambda rule=rule: rule.check(resolved))  # type: ignore[misc]
        self.check_rule("", space.default)

    def check_rule(self, field: str, check: Callable[[], object]) -> None:
        try:
            check()
        except InvalidAssignment as error:
            problem = f"the defaults of {error.path} do not work: {error.problem}"
            self.refuse(field, error.value, problem, "change a default or the rule")


def _members(cls: type, root: type) -> dict[str, object]:
    """What the class and its bases below `root` define, the latest definition of a name only."""
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if base not in root.__mro__:
            for name, value in vars(base).items():
                found.pop(name, None)
                found[name] = value
    return found


def _space_of(program: type) -> Space:
    space = program.space()  # type: ignore[attr-defined]  # a Program class, which this module can't import
    assert isinstance(space, Space)
    return space
