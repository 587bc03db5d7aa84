"""Runs inside of the sandbox, as `python -I -S -c SOURCE`: tests in one process, the program under test in another.

One file, because it is handed over as one string; `code.py` reads it as text and never imports it. It needs the
standard library only, and little of that, because its imports are paid for by every item. The job comes on stdin (a
Python literal), the report goes to stdout, a line for each test.

A program that shares a process with its tests can make them pass without solving anything: it ends the process with
exit code 0, replaces `abs`, reads what is expected off the stack. Here the tester forks the server before it reads
the job and hides its memory from it. The server gets the program and calls, never a test or what is expected, and what
it sends back is decoded to plain values only; anything else stays there, and the tester holds a `Remote` to it.
"""

import _pickle
import builtins
import io
import os
import sys

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DETAIL_CHARACTERS = 300


class Gone(BaseException):
    """The server has ended; it cannot be caught by `except Exception` of a test."""


class Remote:
    """Something in the server that is no plain value. Equal to what the server says is equal, but never to a plain
    value: a class of the program that claims to equal everything must not pass for the right answer."""

    __slots__ = ("_handle", "_server")

    def __init__(self, server, handle):
        object.__setattr__(self, "_server", server)
        object.__setattr__(self, "_handle", handle)

    def __setstate__(self, state):
        raise ValueError("a remote object takes no state")

    def __getattr__(self, name):
        return self._server.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._server.ask("setattr", self, name, value)

    def __eq__(self, other):
        return self is other or (isinstance(other, Remote) and self._server.ask("eq", self, other) is True)

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(self._handle)

    def __call__(self, *args, **kwargs):
        return self._server.ask("call", self, *args, **kwargs)


class Server:
    """The tester's end."""

    def __init__(self, pid, reader, writer):
        self.pid, self.reader, self.writer = pid, reader, writer
        self.makers = {
            "complex": Maker(complex),
            "bytearray": Maker(bytearray),
            "range": Maker(range),
            "_remote": Maker(lambda handle: Remote(self, handle)),
            "_module": Maker(real_module),
            **{plain.__name__: Maker(exactly_a(plain)) for plain in PLAIN},
        }

    def ask(self, name, *args, **kwargs):
        buffer = io.BytesIO()
        try:
            ArgumentPickler(buffer, 4).dump((name, args, kwargs))
        except (_pickle.PicklingError, TypeError, AttributeError) as error:
            raise TypeError(f"an argument of the test cannot be sent to the program: {error}") from None
        try:
            send(self.writer, buffer.getvalue())
            status, value, changed = self.load(receive(self.reader))
        except (EOFError, OSError):
            raise Gone() from None
        except ValueError as error:
            raise RuntimeError(f"the program's answer cannot be read: {error}") from None
        if status == "raise":
            kind, text = value
            known = getattr(builtins, str(kind), None)
            if isinstance(known, type) and issubclass(known, Exception):
                raise known(str(text))
            raise RuntimeError(f"{kind}: {text}")
        for index, after in changed:
            replace(args[1:][index] if name == "call" else args[index], after)
        return value

    def load(self, data):
        makers = self.makers

        class Plain(_pickle.Unpickler):
            def find_class(self, module, name):
                return makers[name]

        try:
            status, value, changed = Plain(io.BytesIO(data)).load()
            return status, value, list(changed)
        except Exception as error:
            raise RuntimeError(f"the program's answer cannot be read: {type(error).__name__}") from None


class Maker:
    """What a pickle may call. Not the class itself: a pickle could set attributes on that."""

    __slots__ = ("_make",)

    def __init__(self, make):
        self._make = make

    def __call__(self, *args):
        return self._make(*args)

    def __setstate__(self, state):
        raise ValueError("takes no state")


def exactly_a(plain):
    def check(value):
        if type(value) is not plain:
            raise ValueError("not a plain value")
        return value

    return check


def real_module(name):
    if type(name) is str and name in sys.stdlib_module_names:
        return __import__(name)
    raise ValueError("no module of the standard library")


class ArgumentPickler(_pickle.Pickler):
    def reducer_override(self, value):
        if type(value) is Remote:
            return _local, (value._handle,)
        return NotImplemented


def replace(target, after):
    """What the program did to an argument, done to the tester's own."""
    if type(target) is list:
        target[:] = after
    elif type(target) in (dict, set):
        target.clear()
        target.update(after)


OPERATORS = [
    "lt",
    "le",
    "gt",
    "ge",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "neg",
    "abs",
    "getitem",
    "setitem",
    "contains",
]


def forward(name, operation):
    def method(self, *args):
        return self._server.ask(operation, self, *args)

    setattr(Remote, f"__{name}__", method)


for _name in [*OPERATORS, "len", "iter", "next", "str", "repr", "bool", "int", "float"]:
    forward(_name, _name)


# The server's side: everything below here up to the next such line runs beside the program, and is as trusted as that.

OBJECTS: list = []
PLAIN: tuple = (int, float, str, bytes, tuple, list, set, frozenset, dict)


def _remote(handle):
    raise AssertionError("made in the tester")


def _module(name):
    raise AssertionError("made in the tester")


def _local(handle):
    return OBJECTS[handle]


class ValuePickler(_pickle.Pickler):
    """Plain values as they are, subclasses of them (namedtuple, Counter) as the plain value, the rest as a handle."""

    def reducer_override(self, value):
        kind = type(value)
        if kind in (complex, bytearray, range) or any(value is callee for callee in CALLEES):
            return NotImplemented
        if kind is type(sys):
            return _module, (value.__name__,)
        for plain in PLAIN:
            if isinstance(value, plain):
                return plain, (plain(value),)
        OBJECTS.append(value)
        return _remote, (len(OBJECTS) - 1,)


CALLEES = (_remote, _module, complex, bytearray, range, *PLAIN)


def serve(reader, writer):
    import operator

    program = type(sys)("program")
    operations = {name: getattr(operator, f"__{name}__") for name in OPERATORS}
    operations.update(len=len, iter=iter, next=next, str=str, repr=repr, bool=bool, int=int, float=float)
    operations.update(eq=operator.eq, getattr=getattr, setattr=setattr, load=load, compile=build, run=run_program)
    operations["call"] = lambda function, *args, **kwargs: function(*args, **kwargs)
    operations["names"] = lambda _, names: {n: vars(program)[n] for n in names if n in vars(program)}
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # site is not loaded
    OBJECTS.append(program)
    while True:
        try:
            name, args, kwargs = _pickle.loads(receive(reader))
        except EOFError:
            os._exit(0)
        try:
            value = operations[name](*args, **kwargs)
            mutable = args[1:] if name == "call" else ()
            answer = encode(("ok", value, [(i, a) for i, a in enumerate(mutable) if type(a) in (list, dict, set)]))
        except BaseException as error:
            known = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
            kind = known[0] if type(error).__name__ in known else type(error).__name__
            try:
                text = str(error)
            except BaseException:
                text = ""
            answer = encode(("raise", (kind, text[:DETAIL_CHARACTERS]), []))
        send(writer, answer)


def encode(answer):
    buffer = io.BytesIO()
    ValuePickler(buffer, 4).dump(answer)
    return buffer.getvalue()


def load(program, source, name):
    """Run the program's definitions. `name` is its __name__: a main part runs for tests on stdin only."""
    program.__name__ = name
    sys.modules[name] = program
    exec(compile(source, "program.py", "exec"), vars(program))


def build(_, source, suffix, command):
    """Compile in the working directory; the compiler's complaint or an empty string."""
    with open("program" + suffix, "w") as file:
        file.write(source)
    code, _output, errors = run_child(b"", lambda: os.execv(command[0], command), 0)
    return "" if code == 0 else errors or f"compiler ended with {code}"


def run_program(_, source, stdin, max_bytes):
    """One run as a program of its own: (exit code or minus the signal, stdout, end of stderr)."""
    if source is None:
        return run_child(stdin, lambda: os.execv("./program", ["./program"]), max_bytes)
    if source not in CODE:
        with open("program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(source)
        CODE[source] = compile(source, "program.py", "exec")
    return run_child(stdin, lambda: run_python(CODE[source]), max_bytes)


CODE: dict = {}


def run_python(code):
    program = type(sys)("__main__")
    program.__file__ = os.path.abspath("program.py")
    sys.modules["__main__"] = program
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["program.py"]
    exit_code = 0
    try:
        exec(code, vars(program))
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


def run_child(stdin, work, max_bytes):
    files = []
    for name in ("in", "out", "err"):
        files.append(os.open(".case-" + name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
        os.unlink(".case-" + name)
    left = memoryview(stdin)
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
    output = os.pread(files[1], max_bytes + 1, 0)
    errors = os.pread(files[2], DETAIL_CHARACTERS, max(0, size - DETAIL_CHARACTERS)).decode("utf-8", "replace")
    for file in files:
        os.close(file)
    return os.waitstatus_to_exitcode(status), output, errors


# Both sides.


def send(writer, data):
    left = memoryview(len(data).to_bytes(8, "little") + data)
    while left:
        left = left[os.write(writer, left) :]


def receive(reader):
    size = int.from_bytes(exactly(reader, 8), "little")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    return exactly(reader, size)


def exactly(reader, size):
    data = bytearray()
    while len(data) < size:
        piece = os.read(reader, min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


# The tester's side.


class Wrong(Exception):
    """A test fails; the message is the detail."""


class CpuTime(Exception):
    """A run of the program used up its CPU time."""


class Broken(Exception):
    """The test is at fault, not the program."""


class Tester:
    def __init__(self, job, server):
        self.job, self.server = job, server
        self.program = Remote(server, 0)

    def tests(self):
        """(number of tests, functions that raise when their test fails)."""
        kind = self.job["kind"]
        if kind == "stdin_stdout":
            return self.stdin_tests()
        self.server.ask("load", self.program, self.job["source"], "program")
        return {"asserts": self.assert_tests, "humaneval": self.humaneval_test, "function_io": self.call_tests}[kind]()

    def stdin_tests(self):
        source = self.job["source"]
        if self.job["compiler"]:
            complaint = self.server.ask("compile", self.program, source, self.job["suffix"], self.job["compiler"])
            if complaint:
                raise Wrong(f"does not compile: {complaint}")
            source = None
        return [lambda case=case: self.stdin_case(source, case) for case in self.job["cases"]]

    def stdin_case(self, source, case):
        most = self.job["output_bytes"]
        code, output, errors = self.server.ask("run", self.program, source, case[0].encode(), most)
        if code in (-24, -9):
            raise CpuTime("CPU time")
        if len(output) > most:
            raise Wrong(f"more than {most} bytes of output")
        if code != 0:
            raise Wrong(f"ended with {how(code)}: {errors.strip()}")
        text = output.decode("utf-8", "replace")
        if lines(text) != lines(case[1]):
            raise Wrong(f"expected {case[1][:100]!r}, got {text[:100]!r}")

    def assert_tests(self):
        space = self.space([self.job["setup"], *self.job["asserts"]], self.job["prefix"])
        exec(parse(self.job["setup"]), space)
        codes = [(parse(text), text) for text in self.job["asserts"]]
        return [lambda code=code, text=text: self.check(code, text, space) for code, text in codes]

    def check(self, code, text, space):
        try:
            exec(code, space)
        except AssertionError as error:
            raise Wrong(f"{text.strip()} fails {error}") from None

    def humaneval_test(self):
        name = self.job["entry_point"]
        space = self.space([self.job["test"], name], self.job["prefix"])
        if name not in space:
            raise Wrong(f"the program does not define {name}")
        candidate = space[name]
        exec(parse(self.job["test"]), space)
        return [lambda: space["check"](candidate)]

    def call_tests(self):
        name = self.job["fn_name"]
        found = self.server.ask("names", self.program, [name, "Solution"])
        if name not in found and "Solution" not in found:
            raise Wrong(f"the program does not define {name}")
        function = found[name] if name in found else getattr(found["Solution"](), name)
        return [lambda case=case: self.call(function, case) for case in self.job["cases"]]

    def call(self, function, case):
        got = as_json(function(*case[0]))
        # APPS wraps some results in a list of one.
        if not (same(got, case[1]) or (type(case[1]) is list and len(case[1]) == 1 and same(got, case[1][0]))):
            raise Wrong(f"expected {repr(case[1])[:100]}, got {repr(got)[:100]}")

    def space(self, texts, prefix):
        """The tests' globals: what the task gives, then from the program what the tests name and nothing gives."""
        space: dict = {"__name__": "tests"}
        if prefix:
            exec(parse(prefix), space)
            entry = self.job.get("entry_point")
            space.pop(entry, None)
        named = set().union(*(names_of(parse(text)) for text in texts))
        wanted = [n for n in named if not hasattr(builtins, n) and n not in space]
        for name, value in self.server.ask("names", self.program, wanted).items():
            if type(name) is str and name in wanted:
                space[name] = value
        # A program's `math` could be anything. What the tests call by its bare name is a function that is named so.
        for name in wanted:
            if name in sys.stdlib_module_names and name not in texts and not any(name + "(" in text for text in texts):
                space[name] = __import__(name)
        return space


def parse(text):
    try:
        return compile(text, "tests.py", "exec")
    except (SyntaxError, ValueError) as error:
        raise Broken(f"the test cannot be compiled: {error}") from None


def names_of(code):
    found = set(code.co_names)
    for constant in code.co_consts:
        if type(constant) is type(code):
            found |= names_of(constant)
    return found


def lines(text):
    """Words by line, as most graders compare: blank lines and space within a line do not count."""
    return [words for words in map(str.split, text.splitlines()) if words]


def as_json(value):
    if type(value) in (list, tuple):
        return [as_json(v) for v in value]
    return {k: as_json(v) for k, v in value.items()} if type(value) is dict else value


def same(a, b):
    if type(a) is list and type(b) is list:
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is float and type(b) is float:
        return a == b or abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    return type(a) is not Remote and a == b


def hide():
    """Keep other processes of this user out of this one's memory and files."""
    import ctypes

    if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) != 0:  # PR_SET_DUMPABLE
        raise OSError("prctl(PR_SET_DUMPABLE) failed")


def how(code):
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main():
    to_server, from_server = os.pipe(), os.pipe()
    nothing = os.open("/dev/null", os.O_RDWR)
    pid = os.fork()
    if pid == 0:
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        for descriptor in (nothing, to_server[1], from_server[0]):
            os.close(descriptor)
        serve(to_server[0], from_server[1])
    os.close(to_server[0])
    os.close(from_server[1])
    report = os.dup(1)
    os.dup2(nothing, 1)
    hide()
    with open(0, "rb", closefd=False) as file:
        job = eval(file.read())

    def say(*words):
        os.write(report, " ".join(words).encode("unicode_escape") + b"\n")

    def failure(error):
        if isinstance(error, Gone):
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status in (-24, -9):
                return "timeout", "CPU time"
            return "wrong", f"the program ended the process with {how(status)}"
        if isinstance(error, CpuTime):
            return "timeout", str(error)
        if isinstance(error, Broken):
            return "error", str(error)
        text = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
        return "wrong", text.rstrip(": ")[:DETAIL_CHARACTERS]

    server = Server(pid, from_server[0], to_server[1])
    try:
        tests = Tester(job, server).tests()
    except BaseException as error:
        say("load", *failure(error))
        tests = []
    for number, test in enumerate(tests):
        try:
            test()
        except BaseException as error:
            say("fail", str(number), *failure(error))
            break
        say("pass", str(number))
    else:
        if tests:
            say("end", str(len(tests)))
    try:  # noqa: SIM105 (contextlib costs a millisecond)
        os.kill(pid, 9)
    except OSError:
        pass
    os._exit(0)


main()
