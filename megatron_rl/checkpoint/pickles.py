"""This module is the gate through which every pickle of a checkpoint goes. It calls nothing but the stand-ins that are
named here.

A pickle is a program. It may name any function of any module and call it, so a checkpoint from somebody else could do
whatever its reader may. Here a pickle gets a closed table of names. A name stands for plain data, a type that cannot be
changed, or a record that keeps what it is given. A name outside the table ends the reading.

A few bytes of a pickle can also take memory or time without end. That ends the reading, too.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from megatron_rl.errors import Fault

# Maps each (module, name) that a pickle may ask for to the object that it gets.
Known = Mapping[tuple[str, str], Any]


class _Fixed(type):
    """Makes classes that cannot be changed: a pickle can set attributes of whatever it has named."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"{cls.__name__}.{name} cannot be set")


class Record(metaclass=_Fixed):
    """Stands for an object of another class as its pickle describes it: the state, and nothing that acts on it."""

    __slots__ = ("state",)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def record(name: str) -> type[Record]:
    """Make a class of records, so that an object of one class cannot stand for one of another."""
    return cast(type[Record], _Fixed(name, (Record,), {"__slots__": ()}))


class _Ordered(collections.OrderedDict[Any, Any], metaclass=_Fixed):
    """Takes items only one by one, so that their keys are checked."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


class Ignored(metaclass=_Fixed):
    """Stands for an object that nobody looks at, whatever it is made of."""

    __slots__ = ()

    def __new__(cls, *_: object) -> "Ignored":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


DTYPES: Known = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
# The names for tensors and for plain containers around them.
_SAVED: Known = {
    **DTYPES,
    ("collections", "OrderedDict"): _Ordered,
    ("torch", "Size"): torch.Size,
    ("torch.storage", "UntypedStorage"): Ignored,
    ("torch._utils", "_rebuild_tensor_v2"): Ignored,
    ("torch._utils", "_rebuild_tensor_v3"): Ignored,
    **{("torch", f"{name}Storage"): Ignored for name in _STORAGES},
}


def unpickle(data: bytes, known: Known, where: str) -> Any:
    """Read what a pickle holds. Fault, before anything else happens, when it names something that is not in `known`.

    Any other exception says that the pickle is damaged.
    """
    return _Gate(data, known, where).load()


# Only these types may be keys. A tuple that holds one tuple twice, nested fifty times, takes years to hash.
_KEYS = (str, int, float, bytes, type(None), Record, Ignored)


def _codes() -> dict[int, Any]:
    """Return what each opcode of a pickle does. Keys are checked before they are hashed."""
    codes: dict[int, Any] = dict(pickle._Unpickler.dispatch)
    # The keys lie on the stack alternating with their values.
    for code, keys in ((pickle.SETITEM, slice(-2, -1)), (pickle.SETITEMS, slice(0, None, 2))):
        codes[code[0]] = _with_plain(keys, codes[code[0]])
    # Other ways to keys, and names by number, which other modules may have registered.
    for code in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del codes[code[0]]
    return codes


def _with_plain(keys: slice, run: Callable[[Any], None]) -> Callable[[Any], None]:
    def checked(gate: Any) -> None:
        for key in gate.stack[keys]:
            if not isinstance(key, _KEYS):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")
        run(gate)

    return checked


class _Gate(pickle._Unpickler):
    """Is Python's unpickler in Python: the one in C takes up to 60 GB for a single number in the pickle."""

    dispatch = _codes()

    def __init__(self, data: bytes, known: Known, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._known, self._where = known, where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise Fault(
                f"{self._where} asks for {f'{module}.{name}'[:200]!a}, which no checkpoint of Megatron needs and which "
                "could run a program; nothing of it was run. Do not use this checkpoint"
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Ignored:
        """Return a stand-in for a tensor's numbers, which lie beside the pickle."""
        return Ignored()


def load_saved(data: bytes, where: str) -> Any:
    """Read what torch.save wrote: tensors, numbers, text and plain containers, on the CPU.

    where: its name in messages. Fault when its pickle names anything else, ValueError when it is damaged.
    """
    try:
        unpickle(_pickle_in(data), _SAVED, where)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Fault:
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"{where} cannot be read: its pickle is damaged") from None
    except Exception as error:  # a damaged pickle may end in any
        raise ValueError(f"{where} cannot be read ({error})") from None


def _pickle_in(data: bytes) -> bytes:
    """Return the pickle in the archive that torch.save makes, as torch's own loader finds it."""
    # torch takes what does not begin so for an older format, with a pickle elsewhere.
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("it was not written by torch.save")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(data):
            raise ValueError("it would unpack to more than there is")
    found: bytes = torch._C.PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl")
    return found


def load_tensor(data: bytes, shape: torch.Size, where: str) -> torch.Tensor:
    """Read one tensor that torch.save wrote, as `load_saved` does; ValueError for another shape, too."""
    tensor = load_saved(data, where)
    if type(tensor) is not torch.Tensor:
        raise ValueError(f"{where} is a {type(tensor).__name__}, not a tensor")
    if tensor.shape != shape:
        raise ValueError(f"{where} has a chunk of shape {tuple(tensor.shape)}; {tuple(shape)} was written")
    return tensor


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. ValueError for one that is missing, and for a pipe or a device, which could block for
    ever."""
    if not path.is_file():
        raise ValueError(
            f"{path} is {'not a regular file' if path.exists() else 'missing'}; the checkpoint is not whole"
        )
    return path.open("rb")
