"""Requests made from the server's own OpenAPI document: right ones, wrong ones and odd ones get documented answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serve_parts import answering, desk

from mezzotint.serve.server import Server
from mezzotint.serve.store import Store

CHECKS: list[Any] = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance, negative_data_rejection, unsupported_method,
]  # fmt: skip
EXAMPLES = 12  # of each operation


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZZOTINT_HOME", str(root / "home"))
        server = Server(Store(f"sqlite:///{root / 'jobs.db'}"), {"cells": desk()}, True, root / "audit.jsonl")
        with answering(server) as address:
            yield address


def test_the_document_holds(url: str) -> None:
    document = schemathesis.openapi.from_url(f"{url}/v1/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) >= 14
    for operation in operations:
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:

            @settings(
                max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def holds(case: Any) -> None:
                case.call_and_validate(checks=CHECKS, timeout=60)

            with suppress(Unsatisfiable):  # what takes nothing cannot be asked wrongly
                holds()
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
