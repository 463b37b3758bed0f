"""The command `mezzotint`: find the verb, read its options, run it; say in one or two lines what a user can mend."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from mezzotint.cli.options import nearest, parse
from mezzotint.errors import InputError, Refused

# verb -> what it does; the verb's file has the same name
VERBS = {
    "demo": "the main job on real solar cells: synthetic defects with masks, labels and a report",
    "plan": "what a job will cost before it runs: parameters, operations, memory, time, money",
    "generate": "images from a model: from text or a class, from an image, inside a mask",
    "inspect": "what a model is: parts, parameters, process, latent and text space, licence, lineage",
    "convert": "rewrite a checkpoint as a model folder or as the original single file, without loss",
    "train": "train or fine-tune from a recipe; a stopped run goes on where it was",
    "synth": "a synthetic defect set from your own images: pictures, masks, COCO and YOLO labels",
    "evaluate": "how far synthetic images are from real ones, with intervals",
    "sweep": "quality against time: samplers, steps and guidance on a model, and which to use",
    "verify": "whether a picture or a model is what it says: signature, log, watermark, weights, data",
    "trace": "from a picture back to the images that its model was trained on, every step checked",
    "certs": "the private certificates that sign pictures and models: make, show, renew",
    "serve": "models over HTTP: a web page, OpenAI's images API, jobs that nothing loses",
    "keys": "who may ask a server: make, list, revoke",
    "doctor": "why a model's pictures are bad or slow: the cause, the evidence, what mends it",
}

HELP = """usage: mezzotint VERB [options]

Synthetic defects for visual inspection, painted by diffusion models you can train, check and trace.

{verbs}

  mezzotint VERB --help   what a verb takes, with an example
  mezzotint --version

Exit code 0: done, 1: the answer is no, 2: the input was wrong. MEZZOTINT_DEBUG=1 shows tracebacks."""


def entry() -> None:
    """What the installed command calls."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; what the user can mend goes to stderr as `mezzotint: ...`."""
    debug = os.environ.get("MEZZOTINT_DEBUG", "") not in ("", "0")
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return complain("interrupted", code=130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        drop_output()
        return 1
    except Refused as refusal:
        return complain(str(refusal), code=1)
    except Exception as error:
        message = explain(error)
        if debug or message is None:
            raise
        if isinstance(error, OSError):
            drop_output()
        return complain(message, code=2)


def dispatch(argv: Sequence[str]) -> int:
    """Call the verb named first, with the rest as its options."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS)) + 2
        print(HELP.format(verbs="\n".join(f"  {verb:<{width}}{summary}" for verb, summary in VERBS.items())))
        return 0
    verb, *rest = argv
    if verb == "--version":
        print(f"mezzotint {metadata.version('mezzotint')}")
        return 0
    if verb not in VERBS:
        raise InputError(f"no verb '{verb}'{nearest(verb, VERBS)}. `mezzotint --help` lists them.")
    module = import_module(f"mezzotint.cli.{verb}")
    options = parse(module.Options, verb, rest)
    return module.run(options) or 0


def explain(error: Exception) -> str | None:
    """The one or two lines that a user can act on, or None where the fault is ours and the traceback is wanted."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where(error)}. Free space or choose another folder; nothing half-written was kept."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror or type(error).__name__}{where(error)}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error).lower()):
        return "not enough memory. Ask for a smaller size, or fewer images at a time."
    return None


def where(error: OSError) -> str:
    """`: path`, where the system said which."""
    return f": {error.filename}" if error.filename is not None else ""


def drop_output() -> None:
    """Forget what stdout still holds where it cannot be written, or Python would complain once more at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str, *, code: int) -> int:
    """Write a message for a person on stderr and pass the exit code through."""
    print(f"mezzotint: {message}", file=sys.stderr)
    return code
