"""Prints the share of public definitions that have docstrings, of arguments that are typed, and the number of tests.

A definition is public if no part of its name starts with an underscore; `__init__` counts for its arguments, its
documentation stands with the class.
"""

import ast
from pathlib import Path


ROOT = Path(__file__).parents[1]
FOLDERS = ("configuration", "modeling_med3dvlm", "processing", "hub_cards", "train", "med3dvlm")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(node: ast.AST):
    """All public classes, functions and methods in a module; functions within functions are not public."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child)


def all_functions(node: ast.AST):
    return [child for child in ast.walk(node) if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]


def main() -> None:
    definitions, undocumented, arguments, untyped = 0, [], 0, []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for definition in public_definitions(tree):
            definitions += 1
            if ast.get_docstring(definition) is None:
                undocumented.append(f"{path.name}:{definition.lineno} {definition.name}")
        for function in all_functions(tree):
            signature = function.args
            named = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
            named += [extra for extra in (signature.vararg, signature.kwarg) if extra is not None]
            for argument in named:
                if argument.arg in ("self", "cls", "ctx"):
                    continue
                arguments += 1
                if argument.annotation is None:
                    untyped.append(f"{path.name}:{argument.lineno} {function.name}({argument.arg})")
    tests = sum(
        function.name.startswith("test_")
        for path in (ROOT / "tests").rglob("test_*.py")
        for function in all_functions(ast.parse(path.read_text(encoding="utf-8")))
    )
    print(f"public definitions with docstrings: {1 - len(undocumented) / definitions:.1%} of {definitions}")
    print(f"typed arguments: {1 - len(untyped) / arguments:.1%} of {arguments}")
    print(f"test functions: {tests}")
    for title, entries in (("without docstring", undocumented), ("without type", untyped)):
        for entry in entries:
            print(f"  {title}: {entry}")


if __name__ == "__main__":
    main()
