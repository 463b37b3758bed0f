"""A finished run for an MLflow server: recipe, measures, data set, lineage documents, and a version of its model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mezzotint.errors import InputError
from mezzotint.extras import need
from mezzotint.governance.licences import UNSTATED
from mezzotint.governance.lineage.trained import FOLDER, Trained

EXPERIMENT = "mezzotint"
DIGEST = 36  # characters of a data set's digest that MLflow keeps
LONGEST = 500  # characters of a value; MLflow takes 6000, of which nobody reads so many
AT_ONCE = 900  # measures in one message; the server takes 1000


def record(model: Path, facts: Trained, weights: str, history: Iterable[Mapping[str, Any]], uri: str) -> str:
    """Write the run into an MLflow store (http://..., sqlite:///...) and return its id there; InputError says why not.

    `weights` is the digest of the model, `history` the run's metrics: plain records with a step and numbers. The
    model's files stay where they are: tags of its version name their folder and digest, and its source is the lineage
    that went along, since a server takes no path outside its own store.
    """
    need("mlflow")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, DatasetInput, Metric, Param

    digest = str(facts.data["digest"])
    tags = {
        "mezzotint.weights": weights, "mezzotint.dataset": digest, "mezzotint.base": facts.base or "",
        "mezzotint.licence": facts.licence, "mezzotint.data_licence": facts.data_licence or UNSTATED,
        "mezzotint.folder": str(model.resolve()), "mlflow.source.git.commit": facts.commit or "",
    }  # fmt: skip
    started, ended = (round(1000 * datetime.fromisoformat(time).timestamp()) for time in (facts.started, facts.ended))
    measured = [
        Metric(name, float(value), ended, int(each["step"]))
        for each in history
        for name, value in each.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    params = [Param(name, str(value)[:LONGEST]) for name, value in flat(facts.recipe).items()]
    data = Dataset(f"dataset-{digest[:16]}", digest[:DIGEST], "local", str(facts.data["folder"]))
    try:
        client: Any = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known is not None else client.create_experiment(EXPERIMENT, beside(uri))
        made = client.create_run(experiment, start_time=started, tags=tags, run_name=facts.name).info
        run = made.run_id
        for at in range(0, len(params), 100):
            client.log_batch(run, params=params[at : at + 100])
        for at in range(0, len(measured), AT_ONCE):
            client.log_batch(run, metrics=measured[at : at + AT_ONCE])
        client.log_inputs(run, [DatasetInput(data)])
        client.log_artifacts(run, str(model / FOLDER), "lineage")
        client.set_terminated(run, end_time=ended)
        if not client.search_registered_models(f"name = '{facts.name}'"):
            client.create_registered_model(facts.name)
        client.create_model_version(facts.name, f"{made.artifact_uri}/lineage", run, tags=tags)
    except Exception as error:  # whatever the network, a database and the library come up with
        raise InputError(f"the MLflow store {uri} did not take the run: {' '.join(str(error).split())}") from error
    return str(run)


def beside(uri: str) -> str | None:
    """Where the files of runs go: beside a store that is a file, not into the working folder; None: a server knows."""
    kind, found, file = uri.partition("sqlite:///")
    return (Path(file).resolve().parent / "artifacts").as_uri() if found and not kind else None


def flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested tables as a.b = value, without what is not given."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        elif value is not None:
            found[before + name] = value
    return found
