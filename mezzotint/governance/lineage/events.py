"""The run as OpenLineage events: data set and base in, model out; for a file, or a lineage server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from mezzotint.errors import InputError
from mezzotint.extras import need
from mezzotint.governance.lineage.trained import Trained

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

NAMESPACE, PRODUCER = "mezzotint", "urn:mezzotint"
TIMEOUT = 5.0  # seconds that a lineage server may take


def events(facts: Trained, weights: str) -> list[RunEvent]:
    """Start and end of the run; `weights` is the digest of the model that came out."""
    need("openlineage")
    from openlineage.client import event_v2
    from openlineage.client.facet_v2 import dataset_version_dataset, documentation_dataset, source_code_location_job

    ol: Any = event_v2  # whose classes say too little of themselves to be checked
    version_of: Any = dataset_version_dataset.DatasetVersionDatasetFacet
    told_of: Any = documentation_dataset.DocumentationDatasetFacet
    place_of: Any = source_code_location_job.SourceCodeLocationJobFacet

    def known(kind: Any, name: str, digest: str, says: str) -> Any:
        version = version_of(datasetVersion=digest, producer=PRODUCER)
        told = told_of(description=says, producer=PRODUCER)
        return kind(namespace=NAMESPACE, name=name, facets={"version": version, "documentation": told})

    digest = str(facts.data["digest"])
    says = f"{len(facts.data['files'])} training files; {facts.data_licence or 'licence not stated'}"
    given = [known(ol.InputDataset, f"dataset/{digest[:16]}", digest, says)]
    if facts.base:
        says = f"weights that the training started from; {facts.base_licence or 'licence not stated'}"
        given.append(known(ol.InputDataset, f"model/{facts.base[:16]}", facts.base, says))
    made = known(ol.OutputDataset, f"model/{weights[:16]}", weights, f"{facts.kind} {facts.name}; {facts.licence}")
    source = {}
    if facts.commit:
        place = place_of(type="git", url=PRODUCER, version=facts.commit, producer=PRODUCER)
        source = {"sourceCodeLocation": place}
    run = ol.Run(runId=str(uuid5(NAMESPACE_URL, f"{PRODUCER}/{weights}/{facts.started}")))
    job = ol.Job(namespace=NAMESPACE, name=f"train.{facts.method}", facets=source)

    def event(state: Any, time: str, outputs: list[Any]) -> RunEvent:
        return ol.RunEvent(
            eventType=state, eventTime=time, run=run, job=job, producer=PRODUCER, inputs=given, outputs=outputs
        )

    return [event(ol.RunState.START, facts.started, []), event(ol.RunState.COMPLETE, facts.ended, [made])]


def lines(found: list[RunEvent]) -> str:
    """A JSON object a line, as OpenLineage's file transport writes them."""
    from openlineage.client.serde import Serde

    return "".join(f"{Serde.to_json(event)}\n" for event in found)


def send(found: list[RunEvent], url: str) -> None:
    """Post the events to a lineage server; InputError where it does not take them."""
    need("openlineage")
    from openlineage.client import OpenLineageClient
    from openlineage.client.transport.http import HttpConfig, HttpTransport

    client = OpenLineageClient(transport=HttpTransport(HttpConfig(url=url, timeout=TIMEOUT, retry={"total": 1})))
    try:
        for event in found:
            client.emit(event)
    except Exception as error:  # whatever the network and its library come up with
        raise InputError(f"the lineage server {url} did not take the events: {error}") from error
