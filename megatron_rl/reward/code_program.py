"""Runs a program inside of the sandbox and answers requests about it: call this function, read that attribute.

It shares its process with the program, so the program may do with it what it likes. Nobody believes it: what it writes
is read as plain data (plain_data.py), and it is never told what anybody expects. It needs the standard library only.

A request and its answer are a line each, both plain data:
    [operation, [arguments], {keywords}] -> ["value", result, [[index or keyword, argument after the call], ...]]
                                         -> ["raised", class, module, base, name, [arguments], {attributes}]
What is no plain value stays here, under a number, and is described by [number, form, name, numbers of its classes that
have one]. form is "", "iterator", "dataclass", "class", or "exception" for a class of exceptions; that has its built-in
base too, and the program's class that it is made from, or None. The class that was raised is such an object, or None
for a built-in one. In a request [number] stands for that object, and for those of the test's own
["dataclass", name, {field: value}] and ["nodes", [[class, {attribute: [is it a node?, its place or a value]}], ...]];
["named", module, name] is a function or type of the standard library.
"""

from __future__ import annotations

import _symtable
import builtins
import operator
import os
import sys

from megatron_rl.reward.plain_data import MAX_BYTES, NotPlain, pack, unpack

# For mypy, which knows this name. Importing typing costs a program 15 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DETAIL_CHARACTERS = 300
# Operations that a test may do on objects alone, without a plain value beside them.
UNARY: dict = {"len": len, "iter": iter, "str": str, "repr": repr, "bool": bool, "hash": hash, "abs": abs}
UNARY.update(neg=operator.neg, pos=operator.pos, invert=operator.invert)
# And those that ask it for what it holds.
KEYED: dict = {"getitem": operator.getitem, "setitem": operator.setitem, "contains": operator.contains}
_BINARY = "lt le gt ge add sub mul truediv floordiv mod matmul and_ or_ xor"
BINARY: dict = {name: getattr(operator, name) for name in _BINARY.split()}
# A program may use these without importing them: its benchmark's judge puts these imports in front of it.
_PRELUDE = """
bisect: bisect_left bisect_right insort insort_left insort_right
collections: ChainMap Counter OrderedDict defaultdict deque namedtuple
copy: deepcopy
dataclasses: dataclass field
datetime: date timedelta
decimal: Decimal
fractions: Fraction
functools: cache cached_property cmp_to_key lru_cache partial reduce total_ordering wraps
heapq: heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest
io: BytesIO StringIO
itertools: accumulate chain combinations combinations_with_replacement compress count cycle dropwhile groupby islice
itertools: pairwise permutations product repeat starmap takewhile tee zip_longest
json: dumps loads
math: acos acosh asin asinh atan atan2 atanh ceil comb copysign cos cosh degrees dist e erf exp fabs factorial floor
math: fmod frexp fsum gamma gcd hypot inf isclose isfinite isinf isnan isqrt lcm ldexp lgamma log log10 log1p log2 modf
math: nan perm pi prod radians sin sinh sqrt tan tanh tau trunc
operator: add and_ attrgetter floordiv itemgetter mod mul neg or_ sub truediv xor
random: choice choices randint randrange sample shuffle uniform
statistics: mean median mode stdev variance
string: ascii_letters ascii_lowercase ascii_uppercase digits punctuation
sys: maxsize setrecursionlimit stderr stdin stdout
typing: Any Callable DefaultDict Deque Dict FrozenSet Generator Generic Hashable Iterable Iterator List Literal Mapping
typing: NamedTuple NoReturn Optional Protocol Sequence Set SupportsInt Tuple Type TypeVar Union cast
"""
_MODULES = "bisect collections copy datetime functools heapq io itertools json math operator os random re statistics"
# Maps a name to (module, name in it). The second is empty for the module itself.
PRELUDE: dict = {name: (name, "") for name in (_MODULES + " string sys time typing numpy").split()}
PRELUDE.update(np=("numpy", ""))
for _line in _PRELUDE.strip().splitlines():
    PRELUDE.update((_name, (_line.partition(":")[0], _name)) for _name in _line.split()[1:])
_MUTABLE = ("list", "dict", "set", "bytearray", "deque", "Counter", "OrderedDict", "defaultdict")


class Lines:
    """Reads and writes lines over a pair of descriptors. Raises EOFError when the other side is gone."""

    def __init__(self, reader: int, writer: int, max_bytes: int = MAX_BYTES) -> None:
        self.reader, self.writer, self.max_bytes = reader, writer, max_bytes
        self._read = bytearray()

    def write(self, line: bytes) -> None:
        left = memoryview(line + b"\n")
        while left:
            left = left[os.write(self.writer, left) :]

    def write_value(self, value: Any) -> None:
        self.write(pack(value))

    def read(self) -> bytes:
        start = 0
        while (end := self._read.find(b"\n", start)) < 0:
            start = len(self._read)
            if start > self.max_bytes:
                raise NotPlain(f"a line of more than {self.max_bytes} bytes")
            piece = os.read(self.reader, 1 << 18)
            if not piece:
                raise EOFError
            self._read += piece
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        return line


class Program:
    """Holds the module with the program's names, and its objects that somebody outside holds by number."""

    def __init__(self) -> None:
        vars(builtins).update(exit=sys.exit, quit=sys.exit)  # site, which has them, is not loaded
        allow_long_integers()
        self.module = type(sys)("program")
        self.objects: list = []
        self._numbers: dict = {}

    def number(self, value: Any) -> int:
        """Return a number that is the same for the same object. The object is kept, so that no other can have its
        identity."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._numbers[id(value)]

    def describe(self, value: Any) -> list:
        """Describe an object that is no plain value, for `pack`."""
        number, kind = self.number(value), type(value)
        if isinstance(value, type):
            if issubclass(value, Exception):
                own = [base for base in value.__bases__ if is_own_exception(base)]
                return [number, "exception", value.__name__, [], built_in_base(value), own[0] if own else None]
            return [number, "class", value.__name__, []]
        form = "iterator" if hasattr(kind, "__next__") else "dataclass" if is_dataclass(kind) else ""
        classes = [self._numbers[id(c)] for c in kind.__mro__ if id(c) in self._numbers]
        return [number, form, kind.__name__, classes]

    def held(self, described: list) -> Any:
        """Find what a description in a request stands for: the object of a number, the program's dataclass with the
        values of the test's, or a function or type of the standard library."""
        if described[0] == "named":
            _, module, name = described
            return operator.attrgetter(name)(sys.modules.get(module) or __import__(module, fromlist=["*"]))
        if described[0] == "nodes":
            return self.nodes(described[1])
        if described[0] != "dataclass":
            return self.objects[described[0]]
        _, name, fields = described
        kind = vars(self.module).get(name)
        if kind is None or set(getattr(kind, "__dataclass_fields__", ())) != set(fields):
            raise TypeError(f"the program has no dataclass {name} with the fields {', '.join(fields)}")
        made = object.__new__(kind)
        for field, value in fields.items():
            object.__setattr__(made, field, value)
        return made

    def nodes(self, described: list) -> Any:
        """Make the objects of the tests' own classes anew, of the program's classes of these names; the first."""
        made: list = []
        for name, _ in described:
            kind = vars(self.module).get(name)
            if not isinstance(kind, type):
                raise TypeError(f"the program has no class {name}")
            made.append(object.__new__(kind))
        for node, (_, attributes) in zip(made, described, strict=True):
            for name, (is_node, value) in attributes.items():
                object.__setattr__(node, name, made[value] if is_node else value)
        return made[0]

    def answer(self, line: bytes) -> bytes:
        try:
            operation, arguments, keywords = unpack(line, self.held)
            given = by_place(arguments, keywords) if operation == "call" else {}
            before = {place: as_line(value, self.describe) for place, value in given.items()}
            result = OPERATIONS[operation](self, *arguments, **keywords)
            changed = [
                [place, value]
                for place, value in given.items()
                if before[place] is not None and as_line(value, self.describe) != before[place]
            ]
            return pack(["value", result, changed], self.describe)
        except BaseException as error:
            return pack(self.raised(error), self.describe)

    def raised(self, error: BaseException) -> list:
        kind = type(error)
        try:
            arguments: list = plain_only(list(error.args)) or [str(error)[:DETAIL_CHARACTERS]]
        except BaseException:
            arguments = []
        own = kind if is_own_exception(kind) else None
        try:
            attributes = {name: value for name, value in vars(error).items() if plain_only([value])}
        except BaseException:
            attributes = {}
        return ["raised", own, kind.__module__, built_in_base(kind), kind.__name__, arguments, attributes]


def plain_only(values: list) -> list | None:
    """Return these values where all are plain and short, else None."""
    try:
        pack(values, max_bytes=4 * DETAIL_CHARACTERS)
    except BaseException:
        return None
    return values


def is_own_exception(kind: type) -> bool:
    return issubclass(kind, Exception) and kind.__module__ != "builtins"


def is_dataclass(kind: type) -> bool:
    return hasattr(kind, "__dataclass_fields__")


def by_place(arguments: list, keywords: dict) -> dict:
    """Name the arguments of a call by their index or keyword; the first of them is what is called."""
    return {**dict(enumerate(arguments[1:])), **keywords}


def as_line(value: Any, describe: Any) -> bytes | None:
    """Write an argument down, to compare it before and after a call; None for one that no call can change."""
    return pack(value, describe) if type(value).__name__ in _MUTABLE else None


def built_in_base(kind: type) -> str:
    return next((c.__name__ for c in kind.__mro__ if c.__module__ == "builtins"), "Exception")


def allow_long_integers() -> None:
    """Let int() and str() take integers of any length: CPU time is what limits a program."""
    if hasattr(sys, "set_int_max_str_digits"):  # else Python is old, and has no limit
        sys.set_int_max_str_digits(0)


def compiled(source: str) -> Any:
    """Compile the program and import what it uses of the prelude. This file's `annotations` holds for it too: that of
    a class which the task leaves to the reader, `root: TreeNode`, is never evaluated."""
    code = compile(source, "program.py", "exec")
    for name in sorted(unbound(source) & PRELUDE.keys()):
        module, attribute = PRELUDE[name]
        try:
            found = __import__(module)
        except ImportError:  # numpy
            continue
        # It becomes a builtin, so that the tests do not take it for a name that the program defines.
        setattr(builtins, name, getattr(found, attribute) if attribute else found)
    return code


def unbound(source: str) -> set:
    """Find the global names that a program reads and binds nowhere, but for those in annotations."""
    try:
        waiting = [_symtable.symtable("from __future__ import annotations\n" + source, "program.py", "exec")]
    except SyntaxError:  # it has such an import behind its docstring
        waiting = [_symtable.symtable(source, "program.py", "exec")]
    top, read, bound = waiting[0], set(), set()
    while waiting:
        table = waiting.pop()
        waiting += table.children
        for name, flags in table.symbols.items():
            scope = flags >> _symtable.SCOPE_OFF & _symtable.SCOPE_MASK
            is_global = table is top or scope in (_symtable.GLOBAL_IMPLICIT, _symtable.GLOBAL_EXPLICIT)
            if is_global and flags & (_symtable.DEF_LOCAL | _symtable.DEF_IMPORT):
                bound.add(name)
            elif is_global and flags & _symtable.USE:
                read.add(name)
    return read - bound


def load(program: Program, source: str) -> None:
    """Run the program's definitions. Its name is not "__main__": a main part runs for tests on stdin only."""
    sys.modules["program"] = program.module
    exec(compiled(source), vars(program.module))


def names(program: Program, wanted: list) -> dict:
    """Find what the program defines of these names. Its modules are left out: the tests import their own."""
    found = {name: vars(program.module)[name] for name in wanted if name in vars(program.module)}
    return {name: value for name, value in found.items() if type(value) is not type(sys)}


def defines(program: Program, name: str) -> str:
    """Return a complaint where the program has neither a function of that name nor a class Solution, else an empty
    string."""
    return "" if {name, "Solution"} & set(vars(program.module)) else f"the program does not define {name}"


def solve(program: Program, name: str, arguments: list) -> Any:
    """Call the function of that name, or that method of a new Solution."""
    found = vars(program.module)
    function = found[name] if name in found else getattr(found["Solution"](), name)
    return function(*arguments)


def call(program: Program, target: Any, /, *arguments: Any, **keywords: Any) -> Any:
    return target(*arguments, **keywords)


def next_of(program: Program, iterator: Any) -> list:
    """Return [element] or []: an end that cannot be mistaken for an error."""
    try:
        return [next(iterator)]
    except StopIteration:
        return []


def fields_of(record: Any) -> dict:
    """Give a dataclass as field -> [value, does it count when two are compared?]. Both sides do it in this way."""
    fields = type(record).__dataclass_fields__
    return {name: [getattr(record, name), bool(field.compare)] for name, field in fields.items()}


def compile_program(program: Program, source: str, suffix: str, command: list) -> str:
    """Compile in the working directory; return a complaint or an empty string."""
    with open("program" + suffix, "w", encoding="utf-8") as file:
        file.write(source)
    code, _output, errors = run_child("", lambda: os.execv(command[0], command), 0)
    return "" if code == 0 else "does not compile: " + (errors or f"the compiler ended with {code}")


def run(program: Program, source: Any, stdin: str, max_bytes: int) -> list:
    """Run it once as a program of its own; return [exit code or minus the signal, stdout, end of stderr].

    source: None runs what was compiled. stdout has one byte more than max_bytes if there was more.
    """
    if source is None:
        return run_child(stdin, lambda: os.execv("./program", ["./program"]), max_bytes)
    if source not in CODE:
        with open("program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(source)
        CODE[source] = compiled(source)
    return run_child(stdin, lambda: run_main(CODE[source]), max_bytes)


CODE: dict = {}


def run_main(code: Any) -> None:
    main = type(sys)("__main__")
    main.__file__ = os.path.abspath("program.py")
    sys.modules["__main__"] = main
    sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.argv = ["program.py"]
    exit_code = 0
    try:
        exec(code, vars(main))
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_code = 1
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    sys.stdout.flush()
    os._exit(exit_code & 255)


def run_child(stdin: str, work: Any, max_bytes: int) -> list:
    files = []
    for name in ("in", "out", "err"):
        files.append(os.open(".case-" + name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
        os.unlink(".case-" + name)
    left = memoryview(stdin.encode())
    while left:
        left = left[os.write(files[0], left) :]
    os.lseek(files[0], 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        try:
            for target, file in enumerate(files):
                os.dup2(file, target)
            os.closerange(3, 64)
            work()
        finally:
            os._exit(126)
    status = os.waitpid(pid, 0)[1]
    size = os.fstat(files[2]).st_size
    output = os.pread(files[1], max_bytes + 1, 0).decode("utf-8", "replace")
    errors = os.pread(files[2], DETAIL_CHARACTERS, max(0, size - DETAIL_CHARACTERS)).decode("utf-8", "replace")
    for file in files:
        os.close(file)
    return [os.waitstatus_to_exitcode(status), output, errors]


OPERATIONS: dict = {
    "load": load,
    "names": names,
    "call": call,
    "defines": defines,
    "solve": solve,
    "get": lambda program, target, name: getattr(target, name),
    "set": lambda program, target, name, value: setattr(target, name, value),
    "eq": lambda program, one, other: one == other,
    "isinstance": lambda program, value, kind: isinstance(value, kind),
    "issubclass": lambda program, one, other: issubclass(one, other),
    "fields": lambda program, record: fields_of(record),
    "next": next_of,
    "compile": compile_program,
    "run": run,
    **{
        name: lambda program, *values, apply=apply: apply(*values)
        for name, apply in {**UNARY, **KEYED, **BINARY}.items()
    },
}


def serve(lines: Lines) -> None:
    """Answer until the other side is gone."""
    program = Program()
    while True:
        try:
            request = lines.read()
        except EOFError:
            os._exit(0)
        lines.write(program.answer(request))


def silence(*descriptors: int) -> None:
    """Make these lead nowhere: who reads there finds the end, and what is written there is lost."""
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def main(max_bytes: int) -> None:
    """Answer the requests that come on stdin, a socket, and write there. What the program prints goes nowhere."""
    channel = os.dup(0)
    silence(0, 1)
    serve(Lines(channel, channel, max_bytes))


def answer_all() -> None:
    """Answer on stdout the requests that come on stdin, all at once: for where there is no socket."""
    with open(0, "rb", closefd=False) as file:
        requests = file.read().splitlines()
    lines = Lines(-1, os.dup(1))
    silence(0, 1)
    program = Program()
    for request in requests:
        lines.write(program.answer(request))
    os._exit(0)
