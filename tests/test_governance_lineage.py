"""The lineage of a model: valid by its own standards, and broken by any change."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mezzotint import files
from mezzotint.errors import InputError
from mezzotint.governance import certificates
from mezzotint.governance.hop import failed
from mezzotint.governance.lineage import Trained, bom, checked, events, folder, registry, statement, written
from mezzotint.governance.lineage.trained import digests

DATA = {"a.png": "11" * 32, "metadata.jsonl": "22" * 32}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "certificates"


def facts(**changes: Any) -> Trained:
    told: dict[str, Any] = {
        "name": "cracks", "method": "lora", "kind": "LoRA", "recipe": {"seed": 3, "steps": 100},
        "contract": {"family": "sd1"}, "data": {"digest": files.sha256_json(DATA), "folder": "cells", "files": DATA},
        "base": "33" * 32, "licence": "CreativeML OpenRAIL-M", "data_licence": "CC-BY-NC-SA-4.0",
        "base_licence": "CreativeML OpenRAIL-M", "started": "2026-01-01T10:00:00+00:00",
        "ended": "2026-01-01T11:00:00+00:00", "software": {"mezzotint": "0.1.0", "torch": "2.13.0"},
        "commit": "ab" * 20, "measures": {"validation loss": 0.125},
    }  # fmt: skip
    return Trained(**{**told, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    files.write_bytes(path / "adapter.safetensors", bytes(range(256)) * 8)
    files.write_json(path / "contract.json", {"lineage": {"dataset": files.sha256_json(DATA)}})
    written(path, facts())
    return path


def test_everything_is_there_and_holds(model: Path, own_home: Path) -> None:
    at = model / "lineage"
    assert {path.name for path in at.iterdir()} == {
        folder.FACTS, folder.DATA, folder.ATTESTATION, folder.SIGNATURE, folder.BOM, folder.EVENTS, folder.ATLAS,
        folder.ROOT, folder.SIGNER,
    }  # fmt: skip
    hops = checked(model, own_home / "root.pem")
    assert [hop.holds for hop in hops] == [True] * 5, [hop.says for hop in hops]
    assert all("trusted here" in hop.says for hop in hops[:2])
    assert "nobody here vouches for" in checked(model)[0].says
    assert hops[2].digest == facts().data["digest"]
    assert not list(model.glob(".lineage*"))


def test_the_statement_is_one_by_the_standards_own_library(model: Path) -> None:
    from in_toto_attestation.v1.statement import Statement

    content = folder._payload(model / "lineage")
    found = Statement.copy_from_pb(_message(content))
    found.validate()
    assert content["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {each["name"]: each["digest"]["sha256"] for each in content["subject"]} == digests(model)
    build = content["predicate"]["buildDefinition"]
    assert build["externalParameters"]["recipe"] == {"seed": 3, "steps": 100}
    assert {"source", "torch", "dataset", "base weights"} <= {each["name"] for each in build["resolvedDependencies"]}


def _message(content: dict[str, Any]) -> Any:
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement_pb2

    return json_format.ParseDict(
        {("type" if k == "_type" else k): v for k, v in content.items()}, statement_pb2.Statement()
    )


def test_the_bill_of_materials_is_valid_and_says_what_it_must(model: Path) -> None:
    content = json.loads((model / "lineage" / folder.BOM).read_text())
    assert bom.problems(content) is None
    component = content["metadata"]["component"]
    assert component["type"] == "machine-learning-model" and component["pedigree"]["ancestors"][0]["hashes"]
    assert component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "validation loss", "value": "0.125"}
    ]
    assert content["components"][0]["data"][0]["type"] == "dataset"
    assert bom.problems({**content, "nonsense": 1}) is not None
    assert bom.problems(bom.bom(facts(base=None), {})) is None


def swap(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(model: Path) -> None:
        (model / path).write_bytes(change((model / path).read_bytes()))

    return act


def edited(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def act(content: bytes) -> bytes:
        told = json.loads(content)
        change(told)
        return json.dumps(told).encode()

    return act


def restated(told: Any) -> None:
    """Another recipe in the payload, under the old signature."""
    content = json.loads(base64.b64decode(told["payload"]))
    content["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["seed"] = 4
    told["payload"] = base64.b64encode(json.dumps(content).encode()).decode()


def renamed(told: Any) -> None:
    """Another file in the manifest of the signature."""
    payload = base64.b64decode(told["dsseEnvelope"]["payload"]).replace(b"adapter.safetensors", b"adopter.safetensors")
    told["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def foreign(model: Path) -> None:
    """The whole lineage anew, by someone else."""
    written(model, facts(), certificates.init(model.parent / "mallory", "Mallory"))


@pytest.mark.parametrize(
    ("tamper", "hop", "said"),
    [
        (swap("adapter.safetensors", flipped), "signature of the model", "adapter.safetensors"),
        (swap("adapter.safetensors", flipped), "attestation of the training", "adapter.safetensors"),
        (lambda model: (model / "more.bin").write_bytes(b"x"), "signature of the model", "more.bin"),
        (lambda model: (model / "adapter.safetensors").unlink(), "signature of the model", "adapter.safetensors"),
        (swap("contract.json", edited(lambda c: c["lineage"].update(dataset="44" * 32))), "data set of the training",
         "the contract speaks of the data set 4444"),
        (swap("lineage/dataset.json", edited(lambda c: c["files"].update({"a.png": "55" * 32}))),
         "data set of the training", "it says"),
        (swap("lineage/dataset.json", edited(lambda c: c.update(files={}, digest=files.sha256_json({})))),
         "data set of the training", "the attestation speaks of"),
        (swap("lineage/attestation.json", edited(restated)), "attestation of the training", "does not fit"),
        (swap("lineage/attestation.json", lambda b: b[:100]), "attestation of the training", "damaged"),
        (swap("lineage/model.sig", edited(renamed)), "signature of the model", "does not hold"),
        (swap("lineage/facts.json", edited(lambda c: c["recipe"].update(seed=9))), "attestation of the training",
         "facts.json"),
        (swap("lineage/mlbom.cdx.json", edited(lambda c: c["components"][0]["hashes"][0].update(content="66" * 32))),
         "bill of materials", "names the data set 6666"),
        (swap("lineage/mlbom.cdx.json", edited(lambda c: c.update(nonsense=1))), "bill of materials", "is no bill"),
        (swap("lineage/openlineage.ndjson", lambda b: b.replace(files.sha256_json(DATA).encode(), b"77" * 32)),
         "events of the training", "other data"),
        (swap("lineage/atlas.json", lambda b: b.replace(files.sha256_json(DATA).encode(), b"88" * 32)),
         "events of the training", "other data"),
        (lambda model: (model / "lineage" / "signer.pem").unlink(), "attestation of the training", "signer.pem"),
        (foreign, "signature of the model", ""),
        (foreign, "attestation of the training", "not issued by the root"),
    ],
)  # fmt: skip
def test_whatever_is_changed_is_found_and_named(
    tamper: Callable[[Path], Any], hop: str, said: str, model: Path, own_home: Path
) -> None:
    tamper(model)
    found = {each.what: each for each in failed(checked(model, own_home / "root.pem"))}
    assert hop in found and said in found[hop].says, {k: v.says for k, v in found.items()}


def test_a_byte_changed_anywhere_in_any_file_is_found(model: Path, own_home: Path) -> None:
    kept = {path: path.read_bytes() for path in model.rglob("*") if path.is_file() and path.name != folder.ROOT}
    for path, content in kept.items():
        for place in (0, len(content) // 3, len(content) - 2):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert failed(checked(model, own_home / "root.pem")), (path.name, place)
        path.write_bytes(content)
    assert len(kept) == 10 and not failed(checked(model, own_home / "root.pem"))


def test_a_model_without_lineage_is_said_to_have_none(tmp_path: Path) -> None:
    (hop,) = checked(tmp_path)
    assert hop.holds is None and "nothing was written at training" in hop.says


def test_writing_again_replaces_and_a_failure_leaves_the_old(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (model / "lineage" / "model.sig").read_bytes()

    def broken(*given: Any) -> None:
        raise InputError("no space")

    with monkeypatch.context() as patched, pytest.raises(InputError):
        patched.setattr(folder.signature, "sign", broken)
        written(model, facts(name="other"))
    assert (model / "lineage" / "model.sig").read_bytes() == before and not list(model.glob(".lineage*"))
    written(model, facts(name="other"))
    assert json.loads((model / "lineage" / "facts.json").read_text())["name"] == "other"
    assert not failed(checked(model))


def test_events_reach_a_lineage_server(model: Path) -> None:
    taken: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        events.send(events.events(facts(), "99" * 32), f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert [each["eventType"] for each in taken] == ["START", "COMPLETE"]
    assert taken[1]["outputs"][0]["facets"]["version"]["datasetVersion"] == "99" * 32
    assert len({each["run"]["runId"] for each in taken}) == 1 and len(taken[0]["inputs"]) == 2
    with pytest.raises(InputError, match="did not take the events"):
        events.send(events.events(facts(), "99" * 32), f"http://127.0.0.1:{server.server_port}/nowhere")


def test_the_envelope_is_dsse_by_hand() -> None:
    assert statement.encoded("t", b"ab") == b"DSSEv1 1 t 2 ab"


def test_a_run_and_its_model_reach_an_mlflow_store(model: Path, tmp_path: Path) -> None:
    client = pytest.importorskip("mlflow").MlflowClient
    uri, weights = f"sqlite:///{tmp_path / 'store.db'}", "99" * 32
    history = [{"step": 50, "loss": 0.5, "rate": 1e-4}, {"step": 100, "loss": 0.25, "validation": 0.75, "note": "x"}]
    for _ in range(2):
        run = registry.record(model, facts(recipe={"seed": 3, "data": {"size": [8, 8]}}), weights, history, uri)
    store = client(tracking_uri=uri)
    found = store.get_run(run)
    assert found.data.params == {"seed": "3", "data.size": "[8, 8]"}
    assert found.data.metrics == {"loss": 0.25, "rate": 1e-4, "validation": 0.75}
    assert [(each.step, each.value) for each in store.get_metric_history(run, "loss")] == [(50, 0.5), (100, 0.25)]
    assert found.inputs.dataset_inputs[0].dataset.digest == files.sha256_json(DATA)[:36]
    assert found.data.tags["mezzotint.dataset"] == files.sha256_json(DATA)
    assert found.info.end_time - found.info.start_time == 3_600_000 and found.info.status == "FINISHED"
    assert (tmp_path / "artifacts" / run).is_dir()
    assert {Path(each.path).name for each in store.list_artifacts(run, "lineage")} >= {folder.FACTS, folder.SIGNATURE}
    versions = store.search_model_versions("name = 'cracks'")
    assert {each.version for each in versions} == {1, 2} or {each.version for each in versions} == {"1", "2"}
    assert versions[0].tags["mezzotint.weights"] == weights and versions[0].run_id == run
    assert versions[0].tags["mezzotint.folder"] == str(model)
    assert versions[0].source.endswith(f"{run}/artifacts/lineage")  # a server refuses places outside its own store
    with pytest.raises(InputError, match="did not take the run"):
        registry.record(model, facts(), weights, history, "http://127.0.0.1:9")
