"""Every error message in a row, by the file that says it: ``python tests/errors/aloud.py``."""

import ast
import collections
import contextlib
import functools
import importlib
import inspect
import pathlib
import sys

if __name__ == "__main__":  # run as a file, whose own folder is then the path
    root = pathlib.Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "tests")]

import diffprog as dp

PACKAGE = pathlib.Path(dp.__file__).parent
SHARED = {"__init__", "aloud", "given"}  # all other files of this folder collect messages
FILES = sorted({path.stem for path in pathlib.Path(__file__).parent.glob("*.py")} - SHARED)


def examples(name):
    """What one file of this folder collects: message -> a call that is answered with it."""
    return importlib.import_module(f"errors.{name}").EXAMPLES


def constructions(source):
    """The lines, first and last, of every ``LayerError(...)`` in a source, and what it wants."""
    return [(node.lineno, node.end_lineno, ast.get_source_segment(source, node.args[0]))
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("LayerError")]


def sites():
    """Every place of the package that makes an error: (file, first line) -> what it wants."""
    return {(path.relative_to(PACKAGE).as_posix(), line): wants
            for path in sorted(PACKAGE.rglob("*.py"))
            for line, _, wants in constructions(path.read_text())}


@contextlib.contextmanager
def listening():
    """Errors made inside know where: ``error.site`` is (file, line) of the call that made it."""
    plain = dp.LayerError.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        frame = inspect.currentframe().f_back
        path = pathlib.Path(frame.f_code.co_filename)
        inside = path.is_relative_to(PACKAGE)
        self.site = (path.relative_to(PACKAGE).as_posix() if inside else "", frame.f_lineno)

    dp.LayerError.__init__ = init
    try:
        yield
    finally:
        dp.LayerError.__init__ = plain


def answer(call):
    """The error with which the library answers the call; None if it does not mind."""
    with listening():
        try:
            call()
        except dp.LayerError as error:
            return error.with_traceback(None)
    return None


@functools.cache  # several tests read them
def answers(name):
    """The messages that one file collects, each with the error that its call is answered with."""
    return [(message, answer(call)) for message, call in examples(name).items()]


def main():
    """Print them all."""
    said = collections.defaultdict(list)
    for name in FILES:
        for _, error in answers(name):
            said[error.site].append(str(error))
    for file, messages in sorted(by_file(said).items()):
        print(f"\n{file}\n{'-' * len(file)}")
        print(*messages, sep="\n")


def by_file(said):
    """The messages of each file, in the order of its lines."""
    found = collections.defaultdict(list)
    for (file, _), messages in sorted(said.items()):
        found[file] += messages
    return found


if __name__ == "__main__":
    main()
