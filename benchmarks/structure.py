"""What the source looks like in numbers: sizes, one-caller functions, plans as parameters, duplicates, and their bars.

python benchmarks/structure.py [--list KIND] [--bars] [--src FOLDER]

The source is parsed and never imported. `--list` prints the places of one kind instead of the tables, `--bars` ends
with 1 where a bar is missed, and `--src` counts another checkout's src/stillroom and writes nothing. A private
function that has one caller and is shorter than six lines may give its reason on the def line: `# kept: REASON`.
"""

import argparse
import ast
import gc
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from results import save

SRC = Path(__file__).parents[1] / "src" / "stillroom"
BARS = {
    "lines": 29_000,
    "modules": 170,
    "distill_files": 14,
    "one_caller_percent": 50,
    "short_without_reason": 0,
    "plan_and_config_parameters": 40,
    "duplicate_classes": 0,
    "auto_asserts": 0,
}
"""The most that each kind may come to."""

VERB = "Capture|Chat|Distill|Doctor|Evaluate|Generate|Merge|Prune|Transplant|Tune"
PLAN = re.compile(rf"\b(Resolved)?({VERB})?Plan\b")
ROOT_CONFIG = re.compile(rf"\b(({VERB})(Config|Settings|Resolved)|Resolved({VERB})(Config|Settings)?)\b")
NO_SUBJECT = {"As", "By", "How", "In", "Of", "That", "To", "What", "Where", "Which", "Whose", "With"}
NUMBERS = {
    "16384": {"16384", "16 * 1024", "2 ** 14", "1 << 14"},
    "256_mib": {"268435456", "256 * 1024 * 1024", "256 * 2 ** 20", "256 << 20", "2 ** 28", "1 << 28"},
}
"""Numbers whose places are listed, in the ways that they are written."""

Fact = tuple[str, str, float | list[str]]
"""A kind, what it counts, and its number or the places that it counts."""
Node = TypeVar("Node", bound=ast.stmt | ast.expr | ast.arg)


@dataclass
class Module:
    name: str
    path: str
    lines: list[str]
    by_type: dict[type, list]

    def all(self, kind: type[Node]) -> list[Node]:
        return self.by_type.get(kind, [])

    @cached_property
    def reads(self) -> Counter[tuple[type, str]]:
        return reads([*self.all(ast.Name), *self.all(ast.Attribute)])

    @cached_property
    def imports(self) -> list[tuple[str, str]]:
        """Each import as the name that it binds and what it stands for, as `stillroom.models.load`."""
        assert not any(node.level for node in self.all(ast.ImportFrom)), f"{self.path}: a relative import"
        whole = [(alias, "") for node in self.all(ast.Import) for alias in node.names]
        parts = [(alias, f"{node.module}.") for node in self.all(ast.ImportFrom) for alias in node.names]
        return [(alias.asname or alias.name, prefix + alias.name) for alias, prefix in whole + parts]

    def place(self, node: ast.stmt | ast.expr | ast.arg, what: str = "") -> str:
        return f"{self.path}:{node.lineno}  {what or self.lines[node.lineno - 1].strip()}"


def read(src: Path) -> list[Module]:
    modules = []
    for path in sorted(src.rglob("*.py")):
        name = ".".join(path.relative_to(src.parent).with_suffix("").parts).removesuffix(".__init__")
        text, by_type = path.read_text(), defaultdict(list)
        for node in sorted(ast.walk(ast.parse(text)), key=lambda node: getattr(node, "lineno", 0)):
            by_type[ast.FunctionDef if isinstance(node, ast.AsyncFunctionDef) else type(node)].append(node)
        modules.append(Module(name, path.relative_to(src).as_posix(), text.splitlines(), by_type))
    return modules


def every(modules: list[Module], kind: type[Node]) -> list[tuple[Module, Node]]:
    return [(module, node) for module in modules for node in module.all(kind)]


def reads(nodes: Iterable[ast.AST]) -> Counter[tuple[type, str]]:
    """How often each name is read, as a bare name and as an attribute."""
    loads = (n for n in nodes if isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Load))
    return Counter((type(n), n.id if isinstance(n, ast.Name) else n.attr) for n in loads)


def length(node: ast.stmt | ast.expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def sizes(modules: list[Module]) -> Iterator[Fact]:
    yield "lines", "lines of Python in src", sum(len(m.lines) for m in modules)
    yield "modules", "modules, __init__.py among them", len(modules)
    sized = [(len(m.lines), f"{len(m.lines):4}  {m.path}") for m in modules]
    yield "short_modules", "modules that are not empty and have under 60 lines", [p for n, p in sized if 0 < n < 60]
    yield "long_modules", "modules of more than 400 lines", [p for n, p in sized if n > 400]
    yield "folders", "folders, with their files", [f"{n:4}  {path}" for path, n in files_per_folder(modules).items()]
    yield "distill_files", "files in distill/", [m.path for m in modules if m.path.startswith("distill/")]


def files_per_folder(modules: list[Module]) -> dict[str, int]:
    return dict(Counter(str(Path(m.path).parent) for m in modules).most_common())


def functions(modules: list[Module]) -> Iterator[Fact]:
    sized = [(length(f), m.place(f, f"{f.name}: {length(f)} lines")) for m, f in every(modules, ast.FunctionDef)]
    yield "functions", "functions, with methods and inner ones", len(sized)
    yield "median_length", "median lines of a function, from def to its end", statistics.median(n for n, _ in sized)
    yield "over_40", "functions of more than 40 lines", [place for n, place in sized if n > 40]
    yield "over_60", "functions of more than 60 lines", [place for n, place in sized if n > 60]


def private(modules: list[Module]) -> Iterator[Fact]:
    """A function's readers are names in its own module and where it is imported; a method's are attributes there."""
    imported = defaultdict(list)
    for module in modules:
        for name, target in set(module.imports):
            imported[target].append(module.reads[ast.Name, name])
    number, single, short = 0, [], []
    for module in modules:
        methods = {id(f) for c in module.all(ast.ClassDef) for f in c.body}
        for function in (f for f in module.all(ast.FunctionDef) if re.match("_(?!_)", f.name)):
            number += 1
            key = (ast.Attribute if id(function) in methods else ast.Name, function.name)
            uses = module.reads[key] - reads(ast.walk(function))[key]
            if id(function) not in methods:
                uses += sum(imported[f"{module.name}.{function.name}"])
            if uses == 1:
                body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                signature = module.lines[function.lineno - 1 : max(function.lineno, function.body[0].lineno - 1)]
                single.append(module.place(function, f"{function.name}: {lines} lines"))
                if lines < 6 and not re.search(r"# kept: \S", "\n".join(signature)):
                    short.append(single[-1])
    yield "private_functions", "private functions and methods", number
    yield "one_caller", "private functions that are read in one place", single
    yield "one_caller_percent", "their share in percent", round(100 * len(single) / max(number, 1), 1)
    yield "short_without_reason", "those with a body under six lines and no `# kept: REASON`", short


def parameters(modules: list[Module]) -> Iterator[Fact]:
    plans, configs = [], []
    for module in modules:
        origin = {name: target.rpartition(".")[2] for name, target in module.imports}
        for function in module.all(ast.FunctionDef):
            for arg in (node for node in ast.walk(function.args) if isinstance(node, ast.arg)):
                annotation = re.sub(r"Callable\[\[.*?\]", "", ast.unparse(arg).partition(":")[2])
                types = " ".join(origin.get(str(name), str(name)) for name in re.findall(r"\w+", annotation))
                place = module.place(arg, f"{function.name}({ast.unparse(arg)})")
                if PLAN.search(types):
                    plans.append(place)
                elif ROOT_CONFIG.search(types):
                    configs.append(place)
    yield "plan_parameters", "parameters that are a verb's plan", plans
    yield "config_parameters", "parameters that are a verb's root config", configs
    yield "plan_and_config_parameters", "both together", plans + configs


def text(modules: list[Module]) -> Iterator[Fact]:
    classes = defaultdict(dict)
    for m, node in every(modules, ast.ClassDef):
        if not node.name.startswith("_"):
            classes[node.name][m.path] = f"{m.path}:{node.lineno}"
    twice = [f"{name}: {', '.join(places.values())}" for name, places in sorted(classes.items()) if len(places) > 1]
    yield "duplicate_classes", "public class names that two or more modules define", twice
    asserts = [m.place(n) for m, n in every(modules, ast.Assert) if "!= 'auto'" in ast.unparse(n.test)]
    yield "auto_asserts", 'asserts of != "auto"', asserts
    bare = [(m, n, n.value.value) for m, n in every(modules, ast.Expr) if isinstance(n.value, ast.Constant)]
    first = [(m.place(n), re.search(r"\w+", value)) for m, n, value in bare if isinstance(value, str)]
    without = [place for place, word in first if word and word[0] in NO_SUBJECT]
    yield "docstrings", "docstrings, those of attributes too", len(first)
    yield "docstrings_without_subject", f"those that begin with {', '.join(sorted(NO_SUBJECT))}", without
    numbers = [(m, n, repr(n.value)) for m, n in every(modules, ast.Constant)]
    numbers += [(m, n, ast.unparse(n)) for m, n in every(modules, ast.BinOp)]
    for kind, ways in NUMBERS.items():
        written = [m.place(n) for m, n, text in numbers if text in ways]
        yield f"number_{kind}", f"literals of {kind.replace('_mib', ' MiB')}", written
    raised = {id(n.exc) for _, n in every(modules, ast.Raise)}
    made = [(m, n) for m, n in every(modules, ast.Call) if {"why", "fix"} <= {k.arg for k in n.keywords}]
    yield "errors", "hand-written errors of four parts, raised or returned", [m.place(n) for m, n in made]
    yield "error_lines", "their lines", sum(length(n) for _, n in made)
    yield "errors_raised", "those that are raised where they are made", [m.place(n) for m, n in made if id(n) in raised]


def reached(modules: list[Module]) -> Iterator[Fact]:
    """What importing each verb's run.py can reach, by imports inside functions and by names in tables too."""
    by_name = {module.name: module for module in modules}

    def targets(module: Module) -> set[str]:
        strings = [n.value for n in module.all(ast.Constant) if isinstance(n.value, str)]
        tables = [s.replace(":", ".") for s in strings if re.fullmatch(r"stillroom(\.\w+)+(:\w+)?", s)]
        names = [*tables, *(target for _, target in module.imports)]
        return {name if name in by_name else name.rpartition(".")[0] for name in names} & by_name.keys()

    edges = {module.name: targets(module) for module in modules}
    for start in [name for name in by_name if re.fullmatch(r"stillroom\.\w+\.run", name)]:
        seen, todo = set(), {start}
        while todo:
            seen |= todo
            todo = set().union(*(edges[name] for name in todo)) - seen
        verb = start.split(".")[1]
        yield f"{verb}_modules", f"modules that {start} reaches", sorted(by_name[name].path for name in seen)
        yield f"{verb}_lines", "their lines", sum(len(by_name[name].lines) for name in seen)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", metavar="KIND")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--src", type=Path, default=SRC)
    options = parser.parse_args()
    gc.disable()  # all trees live to the end, and looking through them for garbage takes a third of the time
    modules = read(options.src.resolve())
    facts = [fact for count in (sizes, functions, private, parameters, text, reached) for fact in count(modules)]
    places = {kind: found for kind, _, found in facts if isinstance(found, list)}
    values = {kind: len(found) if isinstance(found, list) else found for kind, _, found in facts}
    if options.list:
        if options.list not in places:
            parser.error(f"nothing is listed for {options.list}; the kinds are: {', '.join(places)}")
        print(*places[options.list], sep="\n")
        return
    for kind, meaning, _ in facts:
        print(f"{kind:28}{values[kind]:>8,}  {meaning}")
    missed = [kind for kind, most in BARS.items() if values[kind] > most]
    print(f"\n{'bar':28}{'value':>8}{'at most':>9}")
    for kind, most in BARS.items():
        print(f"{kind:28}{values[kind]:>8,}{most:>9,}{'  missed' * (kind in missed)}")
    if options.src == SRC:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=SRC, text=True).strip()
        save(__file__, {"commit": commit, "bars": BARS, "facts": values, "folders": files_per_folder(modules)})
    sys.exit(options.bars and bool(missed))


if __name__ == "__main__":
    main()
