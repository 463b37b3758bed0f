"""PyTorch pickles (.ckpt, .pt, .pth, .bin): read as data alone, never as a program.

A pickle is a program for a small machine that may call anything. Its instructions are listed first, without running
one: a file that names anything else than what tensors are made of is refused. Only then does `torch.load` read it, with
`weights_only=True`, mapped from disk where the format allows.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mezzotint.checkpoints.header import foreign, read_header, read_start
from mezzotint.errors import InputError

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of files before PyTorch 1.6
LONGEST, MOST = 64 * 2**20, 10**6  # bytes of instructions and their number; a tensor takes about forty

# What tensors are made of.
HARMLESS = re.compile(
    r"collections OrderedDict|_codecs encode|torch (Size|device)|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.serialization _get_layout"
    r"|(__builtin__|builtins) set|torch \w+Storage"
    r"|torch (bfloat16|float\d\w*|u?int\d+|bool|half|float|double|long|int|short)"
)
# What training frameworks leave beside the weights: replaced by something that does nothing, and ignored.
BYSTANDER = re.compile(r"(pytorch_lightning|lightning|omegaconf|numpy)(\.\w+)* \w+|argparse Namespace|typing Any")
PARAMETERS = "torch.nn.modules.container ParameterDict"  # a table of tensors, as the first embedding files have


class Ignored:
    """In the place of an object that is not a weight; whatever it is made with is thrown away."""

    def __init__(self, *given: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class Parameters(Ignored):
    """In the place of a ParameterDict: its table alone."""

    table: object = None

    def __setstate__(self, state: object) -> None:
        self.table = state.get("_parameters") if isinstance(state, dict) else None


def read_pickle(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a PyTorch pickle on the CPU, mapped where the format allows (legacy files are read into memory).

    A training checkpoint yields the weights under "state_dict", else its own tensors, else the one table of tensors in
    it; InputError names the tables where there are several, and `key` chooses. What is no tensor is ignored.
    """
    path = Path(path)
    content = _load(path)
    return {name: _checked(path, name, tensor) for name, tensor in _weights(path, content, key).items()}


def read_record(path: Path) -> dict[str, Any]:
    """What a small PyTorch pickle holds beside tensors too: texts, numbers, and tables of tensors.

    For files that are no network's weights, such as the words of textual inversion. A tensor alone comes under the
    file's own name; what is none of these is ignored.
    """
    path = Path(path)
    content = _load(path)
    if isinstance(content, Tensor):
        content = {path.stem: content}
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} and no table of tensors")
    tables: dict[int, dict[str, Tensor]] = {}  # one that is listed many times is looked at once
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Parameters):
            value = value.table
        if isinstance(value, dict):
            if id(value) not in tables:
                tables[id(value)] = {key: _checked(path, key, tensor) for key, tensor in _tensors(value).items()}
            found[str(name)] = tables[id(value)]
        elif isinstance(value, Tensor):
            found[str(name)] = _checked(path, str(name), value.detach())
        elif isinstance(value, (str, int, float)):
            found[str(name)] = value
    return found


def _load(path: Path) -> object:
    start, size = read_start(path)
    if not size:
        raise InputError(f"{path} is empty (0 bytes): the download broke off, download it again")
    zipped = start.startswith(ZIP)
    if zipped:
        names = _globals(path, io.BytesIO(_program(path)), 1)
    elif start.startswith(LEGACY):
        with open(path, "rb") as file:
            names = _globals(path, file, 4)  # magic, version, machine, content
    else:
        raise InputError(f"{path} was not written by PyTorch: {_looks_like(path, start)}")
    _refuse_programs(path, names)
    bystanders = [(_stand_in(name), name.replace(" ", ".")) for name in names if _stands_beside(name)]
    try:
        with torch.serialization.safe_globals(bystanders), warnings.catch_warnings():  # pyright: ignore
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (
        pickle.UnpicklingError, RuntimeError, OSError, ValueError, TypeError, LookupError, AttributeError, EOFError,
        AssertionError, ArithmeticError, MemoryError,
    ) as error:  # fmt: skip
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is not an intact PyTorch file: {why}. Copy or download it again.") from error


def _stand_in(name: str) -> type:
    kind = Parameters if name == PARAMETERS else Ignored
    return type(kind.__name__, (kind,), {})  # torch tells allowed classes apart by identity


def _stands_beside(name: str) -> bool:
    return name == PARAMETERS or BYSTANDER.fullmatch(name) is not None


def _program(path: Path) -> bytes:
    """The instructions in a zip archive; InputError unless the archive is laid out as PyTorch does it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise ValueError("it names a member twice")
            for name in names:
                if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"it has a member outside of itself, {name[:80]!r}")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("it is compressed, which PyTorch never does")
            if any(name.endswith("/constants.pkl") for name in names):
                raise ValueError("it is a TorchScript program, not weights")
            programs = [member for member in members if PurePosixPath(member.filename).name == "data.pkl"]
            if len(programs) != 1 or len({PurePosixPath(name).parts[0] for name in names}) != 1:
                raise ValueError("it is some other zip archive")
            if programs[0].file_size > min(LONGEST, path.stat().st_size):
                raise ValueError(f"it lists {programs[0].file_size} bytes of instructions")
            return archive.read(programs[0])
    except (OSError, ValueError, RuntimeError, LookupError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an intact PyTorch file: {error}. Copy or download it again.") from error


def _globals(path: Path, file: BinaryIO, programs: int) -> set[str]:
    """Every name, as "module name", that the first `programs` pickles of a file look up; none of them is run."""
    try:
        return {name for _ in range(programs) for name in _looked_up(file)}
    except (ValueError, UnicodeDecodeError, LookupError, OverflowError) as error:
        raise InputError(f"{path} is not an intact PyTorch file: {error}. Copy or download it again.") from error


def _looked_up(file: BinaryIO) -> Iterator[str]:
    texts: list[str] = []
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count > MOST:
            raise ValueError(f"it has more than {MOST} instructions")
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif opcode.name == "STACK_GLOBAL":  # the two texts before it, if nobody hides them
            yield " ".join(texts[-2:])
        elif isinstance(argument, str):
            texts = [*texts[-1:], argument]


def _refuse_programs(path: Path, names: Iterable[str]) -> None:
    odd = sorted(name for name in names if not HARMLESS.fullmatch(name) and not _stands_beside(name))
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise InputError(
            f"{path} is a program, not only weights: it asks for {odd[0].replace(' ', '.')[:80]}{more}, and nothing "
            f"of it was run.\nUse the model's safetensors file, or a pickle that holds nothing but tensors."
        )


def _looks_like(path: Path, start: bytes) -> str:
    """In words, what a file is that is no PyTorch pickle."""
    if (what := foreign(start)) is not None and "pickle" not in what:
        return what
    if start[:1] == b"\x80":
        return "it is a Python pickle of another kind, which could run anything. Use the model's safetensors file."
    try:
        read_header(path)
    except InputError:
        return "its beginning is of no known format. Download it again."
    return "it is a safetensors file, give it the ending .safetensors"


def _weights(path: Path, content: object, key: str | None) -> dict[str, Tensor]:
    """The table of weights in what a pickle held: see `read_pickle`."""
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} and no table of tensors: give a checkpoint's file")
    tables = {str(name): _tensors(value) for name, value in content.items() if isinstance(value, dict)}
    tables = {name: table for name, table in tables.items() if table}
    if key is not None:
        if key not in tables:
            raise InputError(f"{path} has no table of tensors called {key!r}; there are: {', '.join(tables) or 'none'}")
        return tables[key]
    if "state_dict" in tables:
        return tables["state_dict"]
    if own := _tensors(content):
        return own
    tables = {name: table for name, table in tables.items() if not name.startswith("opt")}  # an optimiser's state
    if len(tables) == 1:
        return next(iter(tables.values()))
    if not tables:
        raise InputError(f"{path} holds no tensors: it is not a checkpoint of weights")
    listed = ", ".join(f"{name} ({len(table)} tensors)" for name, table in list(tables.items())[:6])
    raise InputError(f"{path} holds several sets of weights: {listed}.\nChoose one: key={next(iter(tables))!r}.")


def _tensors(table: dict[object, object]) -> dict[str, Tensor]:
    return {name: v.detach() for name, v in table.items() if isinstance(name, str) and isinstance(v, Tensor)}


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor that is as large as it says: strides of zero could make a few bytes into any number of them."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise InputError(f"{path}: {name[:80]} is a sparse or quantised tensor: convert it to a plain one first")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise InputError(f"{path}: {name[:80]} claims {tuple(tensor.shape)} numbers and the file has fewer: a trap")
    return tensor
